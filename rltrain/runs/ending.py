"""The last lines of a run: held-out metrics with standard errors, what changed, a problem before and after, what next.

The held-out completions of the first and the last evaluation are read from ``samples/``.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rltrain.runs.console import shortened
from rltrain.runs.metrics import read_jsonl
from rltrain.runs.summary import plot_curves
from rltrain.types import is_right

WIDTH = 80
SIGNS = ("eval_completions/repeat_share", "eval_completions/think_answer_mismatch")  # the report has them
COUNT = "eval_problems"  # stands in the head, as standard errors stand beside what they are of


def last_lines(run_dir: Path) -> str:
    """Write ``learning_curve.png`` and return the lines."""
    rows = read_jsonl(run_dir / "metrics.jsonl")
    plot_curves({run_dir.name: rows}, run_dir / "learning_curve.png")
    evaluations = [row for row in rows if row.get("eval_accuracy") is not None]
    following = [f"next: python -m rltrain.report {run_dir}", f"run folder: {run_dir}"]
    if not evaluations:
        ran = any("eval_abstained" in row for row in rows)
        why = "every held-out completion abstained, so there is no accuracy; see environment/* and rewards/* metrics"
        return "\n".join([why if ran else "no evaluation was run (evaluation.every_steps=0)", *following])
    first, last = evaluations[0], evaluations[-1]
    before, after = (held_out_samples(run_dir, int(row["step"])) for row in (first, last))
    error = paired_error(before, after) if agrees(first, before) and agrees(last, after) else None
    blocks = [table(first, last, error=error)]
    if last["step"] > first["step"]:
        blocks += [sentence(first, last, error=error), *example(first, last, before, after)]
    return "\n\n".join([*blocks, "\n".join(following)])


def table(first: Mapping[str, Any], last: Mapping[str, Any], *, error: float | None = None) -> str:
    """Held-out metrics of two evaluations and their difference, accuracies with their standard error.

    ``error`` is the standard error of the difference of the accuracies.
    """
    problems = f", n = {int(last['eval_problems'])}" if "eval_problems" in last else ""
    steps = ("step " + str(row["step"]) for row in (first, last))
    names = [name for name in last if name.startswith("eval_") and first.get(name) is not None]
    names = [name for name in names if not name.startswith(COUNT) and not name.endswith("_se") and name not in SIGNS]
    width = max(20, 1 + max(len(_short(name)) for name in names))
    head = f"{'held-out' + problems:{width}s}{next(steps):>17s}{next(steps):>17s}{'change':>18s}"
    return "\n".join([head, *(f"{_short(name):{width}s}{_cells(name, first, last, error)}" for name in names)])


def _short(name: str) -> str:
    return name.removeprefix("eval_").removeprefix("completions/")


def _cells(name: str, first: Mapping[str, Any], last: Mapping[str, Any], error: float | None) -> str:
    spreads = [row.get(f"{name}_se") for row in (first, last)]
    change = last[name] - first[name]
    cells = [f"{_with_error(row[name], spread):>17s}" for row, spread in zip((first, last), spreads, strict=True)]
    changed = _with_error(change, error if name == "eval_accuracy" else None, sign="+")
    return f"{''.join(cells)}{changed:>18s}"


def _with_error(value: float, error: float | None, *, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if error is None else f"{value:{sign}.4f} ± {error:.4f}"


def sentence(first: Mapping[str, Any], last: Mapping[str, Any], *, error: float | None) -> str:
    """What became of the held-out accuracy, in words."""
    change, steps = last["eval_accuracy"] - first["eval_accuracy"], int(last["step"] - first["step"])
    moved = f"rose by {change:.4f}" if change > 0 else f"fell by {-change:.4f}" if change < 0 else "did not change"
    if error is None or not change:
        return f"The held-out accuracy {moved} over {steps} steps."
    beyond = "more" if abs(change) > 2 * error else "no more"
    text = f"The held-out accuracy {moved} over {steps} steps, {beyond} than two standard errors"
    return textwrap.fill(f"{text} ({error:.4f} each, of the difference on the same problems).", WIDTH)


def held_out_samples(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """The rows of ``samples/eval_step_….parquet``, in the order of the held-out problems; or none."""
    import pyarrow.parquet as pq

    path = run_dir / "samples" / f"eval_step_{step:06d}.parquet"
    return pq.read_table(path).to_pylist() if path.exists() else []


def accuracy_by_problem(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The share of right completions of each problem: the reward ``answer``, else the first, gives at least 1."""
    right = defaultdict(list)
    for row in rows:
        named = [key for key in row if key.startswith("reward/")]
        name = "reward/answer" if "reward/answer" in named else next(iter(named), None)
        right[row["problem_id"]].append(name is not None and is_right(row[name]))
    return {problem: sum(values) / len(values) for problem, values in right.items()}


def agrees(values: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the samples give the accuracy that was written; where a reward has its own rule they do not."""
    shares = accuracy_by_problem(rows).values()
    return bool(shares) and math.isclose(sum(shares) / len(shares), values["eval_accuracy"], abs_tol=1e-9)


def paired_error(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> float | None:
    """The standard error of the mean difference over the problems in both: ``std(d)/sqrt(n)``, ddof 1."""
    first, last = accuracy_by_problem(before), accuracy_by_problem(after)
    differences = [last[problem] - first[problem] for problem in first if problem in last]
    return statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None


def example(
    first: Mapping[str, Any],
    last: Mapping[str, Any],
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
) -> list[str]:
    """The first held-out problem whose reward made the more frequent change (a rise, where equal), at two steps.

    The rule is fixed, so that nothing is picked. Where no reward changed it is the first problem. With several
    completions of a problem its first one counts. A change to or from an abstention is neither rise nor fall.
    """
    if not before or [row["problem_id"] for row in before] != [row["problem_id"] for row in after]:
        return []
    pairs = list(zip(before, after, strict=True))
    rose = [pair for pair in pairs if pair[1]["reward"] > pair[0]["reward"]]
    fell = [pair for pair in pairs if pair[1]["reward"] < pair[0]["reward"]]
    which = "The first held-out problem"
    if rose or fell:
        up = len(rose) >= len(fell)
        which = (
            f"The first held-out problem whose reward {'rose' if up else 'fell'} ({len(rose)} rose, {len(fell)} fell)"
        )
    samples = max(rose, fell, key=len)[0] if rose or fell else pairs[0]
    asked = f"{which}, answer {samples[0]['answer']}: {shortened(samples[0]['prompt'])}"
    lines = [
        f"  step {row['step']:<6} reward {sample['reward']:<6.3g} {shortened(sample['completion'])}"
        for row, sample in zip((first, last), samples, strict=True)
    ]
    return ["\n".join([asked, *lines])]
