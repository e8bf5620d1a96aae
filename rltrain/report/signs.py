"""The panel on signs of bad reasoning: by training stage and correctness, and as rules that choose one of n samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rltrain.advantages.failed_steps import failed_step_fraction
from rltrain.compare.statistics import Interval
from rltrain.evaluate import majority
from rltrain.report.folder import RecordedRun
from rltrain.report.intervals import of_change, of_mean
from rltrain.report.samples import NOTE, SampleRow, as_group, by_group
from rltrain.rewards.signs import repeat_share, think_answer_mismatch

STAGES = ("early", "middle", "late")
FILES_OF_A_STAGE = 4  # read of the samples, so that a page of a long run is made in seconds
POTENTIALS = f"{NOTE}step_potential"


@dataclass(frozen=True, kw_only=True)
class SignedCompletion:
    """A completion's signs; None where it has no number twice, or was not probed."""

    right: bool
    length: int
    repeats: float
    mismatch: bool | None
    failed: float | None
    text: str


Rule = Callable[[Sequence[SignedCompletion]], float]


def signed(rows: Sequence[SampleRow]) -> list[SignedCompletion]:
    """The judged completions of a group."""
    made = []
    for row, completion in zip(rows, as_group(rows).completions, strict=True):
        right, potentials = row.get("right"), row.get(POTENTIALS)
        if right is None or math.isnan(right):
            continue
        made.append(
            SignedCompletion(
                right=bool(right),
                length=len(completion.token_ids),
                repeats=repeat_share(completion.written_ids),
                mismatch=think_answer_mismatch(completion.text),
                failed=failed_step_fraction(potentials) if potentials else None,
                text=completion.text,
            )
        )
    return made


def least(sign: Callable[[SignedCompletion], float | None]) -> Rule:
    """The accuracy of the completion of the least ``sign``; of equal ones the mean. One that lacks it is not chosen."""

    def chosen(group: Sequence[SignedCompletion]) -> float:
        values = [(value, each.right) for each in group if (value := sign(each)) is not None]
        lowest = min((value for value, _ in values), default=0.0)
        right = [is_one for value, is_one in values if value == lowest]
        return sum(right) / len(right) if right else math.nan

    return chosen


def _voted(group: Sequence[SignedCompletion]) -> float:
    return majority([each.text for each in group], [each.right for each in group])


RULES: dict[str, Rule] = {
    "fewest failed steps": least(lambda each: each.failed),
    "shortest": least(lambda each: float(each.length)),
    "fewest repeats": least(lambda each: each.repeats),
    "majority": _voted,
}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Accuracy of the completion that a rule chooses, and its difference from one at random, over ``groups``."""

    rule: str
    groups: int
    accuracy: Interval
    gain: Interval | None


def selections(groups: Sequence[Sequence[SignedCompletion]]) -> list[Selection]:
    """Each rule on the groups where it can choose. The gain is paired by group; None where it is 0 in all of them."""
    found = []
    for name, rule in RULES.items():
        pairs = [(_random(group), rule(group)) for group in groups if len(group) > 1]
        pairs = [(before, after) for before, after in pairs if not math.isnan(after)]
        before, after = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if (accuracy := of_mean(after)) is not None:
            gain = of_change(before, after)
            found.append(Selection(rule=name, groups=len(pairs), accuracy=accuracy, gain=gain))
    return found


def _random(group: Sequence[SignedCompletion]) -> float:
    return sum(each.right for each in group) / len(group)


@dataclass(frozen=True, kw_only=True)
class StageSigns:
    """A stage of training: its steps, its completions, and the means of each sign, of right and of wrong ones."""

    name: str
    steps: tuple[int, int]
    completions: int
    means: Mapping[str, tuple[Interval | None, Interval | None]]


def stage_signs(name: str, steps: Sequence[int], completions: Sequence[SignedCompletion]) -> StageSigns:
    """The means of a stage; a sign that no completion has is left out."""
    signs: dict[str, Callable[[SignedCompletion], Any]] = {
        "repeated tokens": lambda each: each.repeats,
        "answer differs from the thought": lambda each: each.mismatch,
        "failed steps": lambda each: each.failed,
    }
    values = {
        sign: [[float(value) for each in completions if each.right is side and (value := read(each)) is not None]
               for side in (True, False)]
        for sign, read in signs.items()
    }  # fmt: skip
    means = {sign: (of_mean(of_right), of_mean(of_wrong)) for sign, (of_right, of_wrong) in values.items()}
    means = {sign: pair for sign, pair in means.items() if any(pair)}
    return StageSigns(name=name, steps=(steps[0], steps[-1]), completions=len(completions), means=means)


@dataclass(frozen=True, kw_only=True)
class Signs:
    """The panel of a run."""

    stages: Sequence[StageSigns]
    selections: Sequence[Selection]


def signs(run: RecordedRun) -> Signs | None:
    """From the recorded samples of training, in up to three stages of equally many files; None without any."""
    by_stage = thirds(run.sampled_steps())
    stages, groups = [], []
    for name, steps in by_stage.items():
        read = [signed(rows) for step in steps for rows in by_group(run.samples(step))]
        groups += read
        stages.append(stage_signs(name, steps, [each for group in read for each in group]))
    stages = [stage for stage in stages if stage.completions]
    return Signs(stages=stages, selections=selections(groups)) if stages else None


def thirds(steps: Sequence[int]) -> dict[str, list[int]]:
    """The steps by stage, at most FILES_OF_A_STAGE of each, spread over it. Fewer than three steps are one stage."""
    if len(steps) < len(STAGES):
        return {"all": list(steps)} if steps else {}
    bounds = [round(number * len(steps) / len(STAGES)) for number in range(len(STAGES) + 1)]
    parts = {name: steps[bounds[i] : bounds[i + 1]] for i, name in enumerate(STAGES)}
    return {name: list(part[:: -(-len(part) // FILES_OF_A_STAGE)]) for name, part in parts.items()}


def in_percent(interval: Interval | None, *, sign: str = "") -> tuple[str, str]:
    """A share and its interval in percent."""
    if interval is None:
        return ("–", "")
    numbers = [f"{100 * each:{sign}.1f}" for each in (interval.estimate, interval.low, interval.high)]
    return (f"{numbers[0]} %", f"{numbers[1]} to {numbers[2]}")
