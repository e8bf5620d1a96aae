"""Held-out metrics at the first and the last evaluation, and the problems that became right or wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rltrain.report.folder import HELD_OUT, RecordedRun
from rltrain.report.samples import SampleRow
from rltrain.runs.summary import MetricRows, series
from rltrain.types import is_right

TAIL_CHARACTERS = 600


@dataclass(frozen=True, kw_only=True)
class MetricChange:
    """A held-out metric at the first and the last evaluation."""

    name: str
    first: float
    last: float


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
    fixed: int | None = None
    broken: int | None = None
    examples: Sequence[TurnedProblem] = ()


def evaluation(run: RecordedRun) -> Evaluation | None:
    """None without an evaluation in the metrics."""
    steps, accuracies = series(run.rows, "eval_accuracy")
    if not steps:
        return None
    first, last = steps[0], steps[-1]
    changes = before_and_after(run.rows)
    plain = Evaluation(first_step=first, last_step=last, changes=changes)
    recorded = run.sampled_steps(HELD_OUT)
    if first == last or first not in recorded or last not in recorded:
        return plain
    before, after = _first_samples(run.samples(first, HELD_OUT)), _first_samples(run.samples(last, HELD_OUT))
    if not (_tells(before, accuracies[0]) and _tells(after, accuracies[-1])):
        return plain
    turned = [
        _turned(before[name], after[name])
        for name in before.keys() & after.keys()
        if _right(before[name]) != _right(after[name])
    ]
    fixed = [problem for problem in turned if problem.right]
    broken = [problem for problem in turned if not problem.right]
    return Evaluation(
        first_step=first,
        last_step=last,
        changes=changes,
        fixed=len(fixed),
        broken=len(broken),
        examples=[*sorted(fixed, key=_order)[:2], *sorted(broken, key=_order)[:2]],
    )


def before_and_after(rows: MetricRows) -> list[MetricChange]:
    """Every ``eval_`` metric that both the first and the last evaluation have."""
    evaluations = [row for row in rows if row.get("eval_accuracy") is not None]
    first, last = evaluations[0], evaluations[-1]
    names = [name for name in last if name.startswith("eval_") and first.get(name) is not None]
    return [MetricChange(name=name, first=first[name], last=last[name]) for name in names if last[name] is not None]


def _first_samples(rows: Sequence[SampleRow]) -> dict[Any, SampleRow]:
    return {row.get("problem_id"): row for row in rows if row.get("sample") == 0}


def _right(row: SampleRow) -> bool:
    """As :func:`rltrain.evaluate.correct_G` has it: the reward ``answer``, else the first part, is at least 1."""
    parts = [key for key in row if key.startswith("reward/")]
    name = "reward/answer" if "reward/answer" in parts else next(iter(parts), "reward")
    return is_right(row.get(name) or 0.0)


def _tells(samples: Mapping[Any, SampleRow], accuracy: float) -> bool:
    """Whether the samples give the recorded accuracy. They do not where a reward has its own rule of right."""
    return bool(samples) and abs(sum(map(_right, samples.values())) / len(samples) - accuracy) < 1e-6


def _turned(before: SampleRow, after: SampleRow) -> TurnedProblem:
    return TurnedProblem(
        prompt=before.get("prompt") or "",
        answer=str(before.get("answer") or ""),
        before=(before.get("completion") or "")[-TAIL_CHARACTERS:],
        after=(after.get("completion") or "")[-TAIL_CHARACTERS:],
        right=_right(after),
    )


def _order(problem: TurnedProblem) -> tuple[int, str]:
    """Short completions first, which are the quickest to read."""
    return len(problem.before) + len(problem.after), problem.prompt
