"""The panel of the introspection head: its calibration on held-out completions, and adaptive sampling beside votes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rltrain.compare.statistics import Interval
from rltrain.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Line, scale
from rltrain.report.folder import HELD_OUT, RecordedRun
from rltrain.report.samples import NOTE
from rltrain.runs.calibration import VALUES, CalibrationBin, calibration, expected_calibration_error

Z = 1.959964


@dataclass(frozen=True, kw_only=True)
class AdaptiveRow:
    """A budget: mean tokens of a problem, accuracies and their differences in shares, with 95 % intervals."""

    budget: float
    tokens: float
    problems: int
    accuracy: Interval
    majority: Interval
    gain_over_majority: Interval
    gain_over_weighted_vote: Interval


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The panel of a run; without a chart where no held-out completion has predictions."""

    step: int
    states: int
    error: float
    chart: Chart | None
    adaptive: Sequence[AdaptiveRow]


def predictions(run: RecordedRun) -> Predictions | None:
    """From the newest held-out samples and ``evaluation.json``; None where neither holds any."""
    steps = run.sampled_steps(HELD_OUT)
    rows = run.samples(steps[-1], HELD_OUT) if steps else []
    pairs = [
        (float(value), row["reward"])
        for row in rows
        if row["reward"] is not None
        for value in row.get(f"{NOTE}{VALUES}") or []
    ]
    bins = calibration([value for value, _ in pairs], [reward for _, reward in pairs])
    adapted = adaptive_rows(run)
    if not bins and not adapted:
        return None
    return Predictions(
        step=steps[-1] if bins else 0,
        states=sum(each.count for each in bins),
        error=expected_calibration_error(bins),
        chart=calibration_chart(bins) if bins else None,
        adaptive=adapted,
    )


def calibration_chart(bins: Sequence[CalibrationBin]) -> Chart:
    """Mean reward against mean prediction, a point per bin, beside the diagonal."""
    ends = [0.0, 1.0, *(number for each in bins for number in (each.predicted, each.observed))]
    x, y = scale(ends, start=LEFT, end=WIDTH - RIGHT), scale(ends, start=HEIGHT - BOTTOM, end=TOP)
    diagonal = " ".join(f"{x(end):g},{y(end):g}" for end in (min(ends), max(ends)))
    points = [(x(each.predicted), y(each.observed)) for each in bins]
    drawn = Line(points=" ".join(f"{a:g},{b:g}" for a, b in points), colour=0, dots=points)
    return Chart(
        title="Reward against prediction",
        says="Mean reward against mean predicted value, by bin of the prediction. The faint line is perfect.",
        lines=[Line(points=diagonal, colour=0, faint=True), drawn],
        ticks_x=x.ticks(4),
        ticks_y=y.ticks(4),
        words=[f"{each.predicted:.2f}: {each.observed:.2f} of {each.count}" for each in bins],
    )


def adaptive_rows(run: RecordedRun) -> list[AdaptiveRow]:
    """What ``rltrain evaluate`` measured in this folder."""
    path = run.path / "evaluation.json"
    try:
        written = json.loads(path.read_text()) if path.exists() else {}
        return [_row(each) for each in written.get("adaptive", [])]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        run.notes.append(f"evaluation.json cannot be read ({type(error).__name__}); it may be torn")
        return []


def _row(each: Mapping[str, float]) -> AdaptiveRow:
    def interval(name: str) -> Interval:
        estimate, half = each[name], Z * each[f"{name}_se"]
        return Interval(estimate=estimate, low=estimate - half, high=estimate + half)

    names = ("accuracy", "majority", "gain_over_majority", "gain_over_weighted_vote")
    return AdaptiveRow(
        budget=each["budget"],
        tokens=each["tokens"],
        problems=int(each["problems"]),
        **{name: interval(name) for name in names},
    )
