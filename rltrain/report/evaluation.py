"""Held-out metrics at the first and the last evaluation with intervals, and the problems that turned right or wrong."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rltrain.compare.statistics import Interval
from rltrain.report import curves, intervals
from rltrain.report.folder import HELD_OUT, RecordedRun
from rltrain.report.samples import SampleRow, by_group, reward, right_part
from rltrain.runs.summary import held_out_metric
from rltrain.types import is_right

TAIL_CHARACTERS = 600
UNSHOWN = ("eval_accuracy_se", "eval_problems")  # the intervals and the heading say them
Problems = Mapping[Any, Sequence[SampleRow]]


@dataclass(frozen=True, kw_only=True)
class MetricChange:
    """A held-out metric at the first and the last evaluation.

    ``is_in_samples``: the recorded completions give both values. Else, or for one problem, there is no interval.
    """

    name: str
    first: float
    last: float
    first_interval: Interval | None = None
    last_interval: Interval | None = None
    change_interval: Interval | None = None
    is_in_samples: bool = False

    @property
    def label(self) -> str:
        """The name without ``eval_``, with places where a line may break."""
        return self.name.removeprefix("eval_").replace("/", "/\u200b").replace("_", "_\u200b")

    @property
    def before(self) -> tuple[str, str]:
        """Value and ends of its interval in words, the latter empty without one."""
        return self._shown(self.first), self._ends(self.first_interval, self._shown)

    @property
    def after(self) -> tuple[str, str]:
        """The same at the last evaluation."""
        return self._shown(self.last), self._ends(self.last_interval, self._shown)

    @property
    def change(self) -> tuple[str, str]:
        """The difference, which is in points for shares."""
        return self._moved(self.last - self.first), self._ends(self.change_interval, self._moved)

    def _shown(self, value: float) -> str:
        return curves.shown(value, share=curves.is_share(self.name))

    def _moved(self, value: float) -> str:
        return curves.difference(value, share=curves.is_share(self.name))

    def _ends(self, interval: Interval | None, worded: Callable[[float], str]) -> str:
        if interval is None:
            return ""
        low, high = (worded(end).removesuffix(" %").removesuffix(" points") for end in (interval.low, interval.high))
        return f"{low} to {high}"


@dataclass(frozen=True, kw_only=True)
class TurnedProblem:
    """A held-out problem whose first completion was right at only one of the two evaluations."""

    prompt: str
    answer: str
    before: str
    after: str
    right: bool


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """``fixed`` and ``broken`` count problems that became right and wrong, None where the samples cannot tell."""

    first_step: int
    last_step: int
    changes: Sequence[MetricChange]
    main: MetricChange | None
    problems: int | None = None
    samples: int = 1
    fixed: int | None = None
    broken: int | None = None
    examples: Sequence[TurnedProblem] = ()


def evaluation(run: RecordedRun) -> Evaluation | None:
    """None without an evaluation in the metrics."""
    evaluations = [row for row in run.rows if row.get("eval_accuracy") is not None]
    if not evaluations:
        return None
    first, last = evaluations[0], evaluations[-1]
    before, after = _problems(run, first["step"]), _problems(run, last["step"])
    shown = [name for name in last if name.startswith("eval_") and name not in UNSHOWN]
    names = [name for name in shown if None not in (first.get(name), last[name])]
    changes = [_change(name, first[name], last[name], before, after) for name in names]
    main = held_out_metric({run.label: run.rows})
    turned = _turned_problems(before, after) if _tells(changes) and first["step"] != last["step"] else None
    return Evaluation(
        first_step=first["step"],
        last_step=last["step"],
        changes=changes,
        main=next((change for change in changes if change.name == main), None),
        problems=len(after) or None,
        samples=max(map(len, after.values()), default=1),
        **_counted(turned),
    )


def _problems(run: RecordedRun, step: int) -> Problems:
    """The completions of each held-out problem at a step, empty where none were recorded."""
    if step not in run.sampled_steps(HELD_OUT):
        return {}
    seen: Counter[Any] = Counter()
    problems = {}
    for rows in by_group(run.samples(step, HELD_OUT)):
        name = rows[0].get("problem_id")
        problems[name, seen[name]] = rows
        seen[name] += 1
    return problems


def _right(row: SampleRow) -> float:
    """1 right, 0 wrong, NaN where the reward that judges abstained."""
    score = row.get(right_part(row)) if row.get("right") is None else row["right"]  # runs of before have no right
    return math.nan if score is None or math.isnan(score) else float(is_right(score))


# How a metric is read off a completion, by a word of its name. NaN does not count, as in the evaluation.
PER_COMPLETION: Mapping[str, Callable[[SampleRow], float]] = {
    "accuracy": _right,
    "reward": reward,
    "length": lambda row: float(len(row.get("token_ids") or ())),
    "clipped": lambda row: float(row.get("finish") == "length"),
}


def _change(name: str, first: float, last: float, before: Problems, after: Problems) -> MetricChange:
    """With intervals where the samples of both evaluations give the recorded values."""
    plain = MetricChange(name=name, first=first, last=last)
    values = next((read for word, read in PER_COMPLETION.items() if word in name), None)
    if values is None or not before or before.keys() != after.keys():
        return plain
    (old, old_means), (new, new_means) = (_means(values, problems) for problems in (before, after))
    # A metric of an extreme (max_length) or of several completions (pass@k) is no mean over them, and does not agree.
    if not (_close(old, first) and _close(new, last)):
        return plain
    both = old_means.keys() == new_means.keys()
    means = [list(by_problem.values()) for by_problem in (old_means, new_means)]
    first_interval, last_interval = (_interval(*pair) for pair in zip(means, (first, last), strict=True))
    paired = both and first_interval is not None and last_interval is not None
    return MetricChange(
        name=name,
        first=first,
        last=last,
        first_interval=first_interval,
        last_interval=last_interval,
        change_interval=intervals.of_change(*means) if paired else None,
        is_in_samples=True,
    )


def _means(values: Callable[[SampleRow], float], problems: Problems) -> tuple[float, dict[Any, float]]:
    """The mean over all completions that count, and by problem. A problem without such a completion is left out."""
    counted = {name: [value for value in map(values, rows) if not math.isnan(value)] for name, rows in problems.items()}
    flat = [value for some in counted.values() for value in some]
    return fmean(flat) if flat else math.nan, {name: fmean(some) for name, some in counted.items() if some}


def _close(found: float, recorded: float) -> bool:
    return abs(found - recorded) <= 1e-4 * max(1, abs(recorded))


def _interval(means: Sequence[float], recorded: float) -> Interval | None:
    """None where problems count unequally, since some of their completions abstained: it would be of another mean."""
    return intervals.of_mean(means) if _close(fmean(means), recorded) else None


def _tells(changes: Sequence[MetricChange]) -> bool:
    """Whether the samples give the recorded accuracy. They do not where a reward has its own rule of right."""
    return any(change.name == "eval_accuracy" and change.is_in_samples for change in changes)


def _turned_problems(before: Problems, after: Problems) -> list[TurnedProblem]:
    """The problems whose first completion is right at only one of the two."""
    pairs = [(before[name][0], after[name][0]) for name in before.keys() & after.keys()]
    return [_turned(old, new) for old, new in pairs if {_right(old), _right(new)} == {0.0, 1.0}]


def _counted(turned: Sequence[TurnedProblem] | None) -> dict[str, Any]:
    if turned is None:
        return {}
    fixed = sorted((problem for problem in turned if problem.right), key=_order)
    broken = sorted((problem for problem in turned if not problem.right), key=_order)
    return {"fixed": len(fixed), "broken": len(broken), "examples": [*fixed[:2], *broken[:2]]}


def _turned(before: SampleRow, after: SampleRow) -> TurnedProblem:
    return TurnedProblem(
        prompt=before.get("prompt") or "",
        answer=str(before.get("answer") or ""),
        before=(before.get("completion") or "")[-TAIL_CHARACTERS:],
        after=(after.get("completion") or "")[-TAIL_CHARACTERS:],
        right=_right(after) > 0,
    )


def _order(problem: TurnedProblem) -> tuple[int, str]:
    """Short completions first, which are the quickest to read."""
    return len(problem.before) + len(problem.after), problem.prompt
