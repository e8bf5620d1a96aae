"""A comparison as a picture: the metric against completions and against seconds, and the paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rltrain.compare.comparison import LEVEL, Comparison
from rltrain.compare.folders import Curve
from rltrain.compare.statistics import bootstrap, interquartile_mean
from rltrain.compare.words import percent


def plot(comparison: Comparison, curves: Sequence[Curve], path: Path) -> None:
    """Three panels. Bands are bootstrap intervals of the interquartile mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    colours = {method.name: f"C{index % 10}" for index, method in enumerate(comparison.methods)}
    panels = [
        (left, "completions", "completions", comparison.completions),
        (middle, "seconds", "seconds of training", comparison.seconds),
    ]
    for axes, axis, unit, budget in panels:
        for name, colour in colours.items():
            grid, estimate, low, high = band([curve for curve in curves if curve.method == name], axis)
            axes.plot(grid, estimate, color=colour, label=name)
            axes.fill_between(grid, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.axvline(budget, color="grey", linestyle=":", linewidth=1)
        axes.set(xlabel=unit, ylabel=comparison.metric)
        axes.grid(alpha=0.3)
    left.set_title("interquartile mean, 95 % bootstrap band", fontsize=10)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(colours), 6))
    _forest(right, comparison, colours)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def band(curves: Sequence[Curve], axis: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The points of all runs up to the end of the shortest, with the interquartile mean and its interval at each."""
    points = [curve.points(axis) for curve in curves]
    grid = np.unique(np.concatenate(points))
    grid = grid[(grid >= max(each[0] for each in points)) & (grid <= min(each[-1] for each in points))]
    values = np.stack([curve.at(axis, grid) for curve in curves])
    intervals = [bootstrap(_by_task(curves, column), interquartile_mean, level=LEVEL) for column in values.T]
    rows = np.array([(interval.estimate, interval.low, interval.high) for interval in intervals]).reshape(-1, 3)
    return grid, rows[:, 0], rows[:, 1], rows[:, 2]


def _by_task(curves: Sequence[Curve], values: np.ndarray) -> list[np.ndarray]:
    tasks = [curve.task for curve in curves]
    return [values[[name == task for name in tasks]] for task in sorted(set(tasks))]


def _forest(axes: Any, comparison: Comparison, colours: Mapping[str, str]) -> None:
    """Each method's paired differences from the baseline at equal completions, their mean and its interval."""
    view = comparison.views[0]
    if not view.differences:
        axes.set_visible(False)
        return
    for row, difference in enumerate(view.differences):
        colour, mean = colours[difference.method], difference.mean
        axes.plot(difference.pairs, [row] * len(difference.pairs), "o", color=colour, alpha=0.5, markersize=4)
        if mean is not None:
            axes.plot([mean.low, mean.high], [row, row], color=colour, linewidth=2)
            axes.plot(mean.estimate, row, "D", color=colour, markersize=7)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(view.differences)), [difference.method for difference in view.differences])
    axes.set_ylim(len(view.differences) - 0.5, -0.5)
    axes.set_xlabel(f"difference in {comparison.metric}")
    axes.set_title(f"minus {comparison.baseline}, same seed; {percent(comparison.level)} interval", fontsize=10)
    axes.grid(alpha=0.3, axis="x")
