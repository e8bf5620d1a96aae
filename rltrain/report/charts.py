"""Coordinates of lines, ticks and bars. The page's template draws them as SVG, in the colours of its theme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from rltrain.report import curves
from rltrain.runs.summary import MetricRows, series, smoothed

T = TypeVar("T")
WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 10, 24
NOISY_FROM, WINDOW = 20, 10


@dataclass(frozen=True, kw_only=True)
class Line:
    """SVG ``points``. ``colour`` is the index of the run. A ``faint`` line is the raw one behind the smoothed."""

    points: str
    colour: int
    faint: bool = False
    dots: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A line chart. Ticks are (position, text), ``words`` says per run where it starts and ends."""

    title: str
    says: str
    lines: Sequence[Line]
    ticks_x: Sequence[tuple[float, str]]
    ticks_y: Sequence[tuple[float, str]]
    words: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A linear map from [low, high] to [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self, most: int, *, share: bool = False) -> list[tuple[float, str]]:
        """Round numbers within the scale, in percent where they are shares."""
        from matplotlib.ticker import MaxNLocator

        values = MaxNLocator(nbins=most).tick_values(self.low, self.high)
        inside = [value for value in values if self.low <= value <= self.high]
        return [(self(value), f"{100 * value:.6g} %" if share else f"{value:.6g}") for value in inside]


def scale(values: Sequence[float], *, start: float, end: float, margin: float = 0.0) -> Scale:
    """The scale of all values, with ``margin`` times their range added on both sides."""
    low, high = min(values), max(values)
    if low == high == 0:
        return Scale(low=0.0, high=1.0, start=start, end=end)
    spare = (high - low) * margin if high > low else abs(high) / 2
    return Scale(low=low - spare, high=high + spare, start=start, end=end)


def thinned(points: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of the points, evenly spaced, with both ends. ``most`` is at least 2."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def line_chart(
    curve: curves.CurveWords, runs: Mapping[str, MetricRows], name: str, *, most_points: int
) -> Chart | None:
    """A metric against steps, one line per run, smoothed over ten steps where there are many. None if no run has it."""
    recorded = {label: series(rows, name) for label, rows in runs.items()}
    if not any(values for _, values in recorded.values()):
        return None
    share = curves.is_share(name)
    x = scale([step for steps, _ in recorded.values() for step in steps], start=LEFT, end=WIDTH - RIGHT)
    all_values = [value for _, values in recorded.values() for value in values]
    y = scale(all_values, start=HEIGHT - BOTTOM, end=TOP, margin=0.05)
    lines, words, count = [], [], 1
    for colour, (label, (steps, values)) in enumerate(recorded.items()):
        if not values:
            continue
        noisy = len(values) > NOISY_FROM
        raw = [(x(step), y(value)) for step, value in zip(steps, values, strict=True)]
        mean = [(a, y(value)) for (a, _), value in zip(raw, smoothed(values, WINDOW), strict=True)]
        lines += [_line(raw, colour, most_points, faint=True)] if noisy else []
        lines.append(_line(mean if noisy else raw, colour, most_points))
        count = WINDOW if noisy else 1
        ends = [curves.shown(fmean(end), share=share) for end in (values[:count], values[-count:])]
        words.append(" → ".join(ends) if len(runs) == 1 else f"{label}: {' → '.join(ends)}")
    averaged = f" Means of {WINDOW} steps, first → last:" if count > 1 else " First → last:"
    return Chart(
        title=curve.title,
        says=f"{curve.says}{averaged}".strip(),
        lines=lines,
        ticks_x=x.ticks(4),
        ticks_y=y.ticks(4, share=share),
        words=words,
    )


def _line(points: Sequence[tuple[float, float]], colour: int, most_points: int, *, faint: bool = False) -> Line:
    points = thinned(points, most_points)
    dots = points if len(points) <= NOISY_FROM else ()
    return Line(points=" ".join(f"{a:g},{b:g}" for a, b in points), colour=colour, faint=faint, dots=dots)


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """A stage in the bar: its mean seconds per step, and its share of the step."""

    name: str
    seconds: float
    share: float


# Timed by the estimator itself, inside the stage that the trainer times.
INSIDE = {"probe": "advantage", "continuations": "advantage"}


def stages(rows: MetricRows) -> list[StageTime]:
    """Mean seconds per step, in the order of the step. What is timed inside a stage is subtracted from it."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("timing_s/"))
    training = max(sum("timing_s/step" in row for row in rows), 1)
    timed = {name.removeprefix("timing_s/"): sum(series(rows, name)[1]) / training for name in names}
    seconds: dict[str, float] = {}
    for stage in (name for name in timed if name not in ("step", *INSIDE)):
        inner = [name for name, outer in INSIDE.items() if outer == stage and name in timed]
        seconds |= {name: timed[name] for name in inner}
        seconds[stage] = max(0.0, timed[stage] - sum(timed[name] for name in inner))
    total = sum(seconds.values())
    return [StageTime(name=name, seconds=value, share=value / total) for name, value in seconds.items() if value > 0]
