"""From curves to the record of a comparison: scores of each method, and paired differences from the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from rltrain.compare.folders import Curve
from rltrain.compare.statistics import (
    Interval,
    bootstrap,
    bootstrap_higher,
    detectable,
    interquartile_mean,
    paired,
)
from rltrain.runs.run_folder import FREE_KEYS, differences

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Method:
    """Facts about a method's runs that belong to no view."""

    name: str
    seeds: Sequence[int]
    start: float
    step_s: float | None
    length_tokens: float | None


@dataclass(frozen=True, kw_only=True)
class Score:
    """A method in a view: the interquartile mean over its runs with its bootstrap interval at 95 %.

    ``reached`` counts the runs that reached the level, in a view of costs, else None. Runs that did not count as the
    budget, which makes the mean a lower bound.
    """

    method: str
    runs: int
    iqm: Interval
    mean: float
    std: float | None
    reached: int | None = None


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """``method`` minus ``baseline``: Student's t over the pairs of runs that share task and seed.

    ``detectable`` is the true difference that this number of pairs of this spread detects with 80 % probability.
    ``probability_higher`` is that of a run of the method scoring higher than a run of the baseline.
    """

    method: str
    baseline: str
    pairs: Sequence[float]
    mean: Interval | None
    std: float | None
    detectable: float | None
    probability_higher: Interval | None


@dataclass(frozen=True, kw_only=True)
class View:
    """A comparison by a single number per run."""

    title: str
    digits: int
    scores: Sequence[Score]
    differences: Sequence[PairedDifference]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All views. ``level`` is that of the intervals of differences, 95 % over all methods together (Bonferroni)."""

    metric: str
    baseline: str
    level: float
    completions: float
    seconds: float
    reach: float
    methods: Sequence[Method]
    views: Sequence[View]
    notes: Sequence[str]


def compare(
    curves: Sequence[Curve], *, metric: str, baseline: str | None = None, reach: float | None = None
) -> Comparison:
    """Compare at the completions and the seconds that all runs reached, and in the completions needed for ``reach``.

    ``baseline`` is the first curve's method by default. ``reach`` is half-way from the baseline's start to its end by
    default. It is reached from above where it lies below the start.
    """
    names = list(dict.fromkeys(curve.method for curve in curves))
    base = names[0] if baseline is None else baseline
    level = 1 - (1 - LEVEL) / max(1, len(names) - 1)
    budget = {axis: float(min(curve.points(axis)[-1] for curve in curves)) for axis in ("completions", "seconds")}
    ends = {axis: [float(curve.at(axis, x)) for curve in curves] for axis, x in budget.items()}
    start = float(np.mean([curve.values[0] for curve in curves if curve.method == base]))
    if reach is None:
        base_ends = [end for curve, end in zip(curves, ends["completions"], strict=True) if curve.method == base]
        reach = (start + float(np.mean(base_ends))) / 2
    costs = [_cost(curve, reach, budget["completions"], falling=reach < start) for curve in curves]
    titled = [
        (f"{metric} after {budget['completions']:,.0f} completions", 3, ends["completions"], None),
        (f"{metric} after {budget['seconds']:,.0f} s of training", 3, ends["seconds"], None),
        (f"completions to {metric} {reach:.3f}", 0, [cost for cost, _ in costs], [reached for _, reached in costs]),
    ]
    return Comparison(
        metric=metric,
        baseline=base,
        level=level,
        completions=budget["completions"],
        seconds=budget["seconds"],
        reach=reach,
        methods=[_method(name, [curve for curve in curves if curve.method == name]) for name in names],
        views=[_view(curves, *view, base=base, level=level) for view in titled],
        notes=_notes(curves, names),
    )


def _view(
    curves: Sequence[Curve],
    title: str,
    digits: int,
    values: Sequence[float],
    reached: Sequence[bool] | None,
    *,
    base: str,
    level: float,
) -> View:
    differences = _differences(curves, values, base=base, level=level)
    return View(title=title, digits=digits, scores=_scores(curves, values, reached), differences=differences)


def _cost(curve: Curve, reach: float, budget: float, *, falling: bool) -> tuple[float, bool]:
    """The completions that a run needed, at most the budget, and whether it reached the level within the budget."""
    needed = curve.completions_to(reach, falling=falling)
    reached = needed is not None and needed <= budget
    return (needed if reached else budget), reached  # type: ignore[return-value]


Cells = Mapping[tuple[str, int], float]


def _cells(curves: Sequence[Curve], values: Sequence[float]) -> dict[str, dict[tuple[str, int], float]]:
    """``{method: {(task, seed): value}}``."""
    cells: dict[str, dict[tuple[str, int], float]] = {}
    for curve, value in zip(curves, values, strict=True):
        cells.setdefault(curve.method, {})[curve.task, curve.seed] = value
    return cells


def _strata(cells: Cells) -> list[np.ndarray]:
    """The scores of each task, tasks in order of name."""
    tasks = sorted({task for task, _ in cells})
    return [np.array([value for (name, _), value in cells.items() if name == task]) for task in tasks]


def _scores(curves: Sequence[Curve], values: Sequence[float], reached: Sequence[bool] | None) -> list[Score]:
    scores = []
    for method, cells in _cells(curves, values).items():
        numbers = np.array(list(cells.values()))
        flags = zip(curves, reached, strict=True) if reached else ()
        scores.append(
            Score(
                method=method,
                runs=len(numbers),
                iqm=bootstrap(_strata(cells), interquartile_mean, level=LEVEL),
                mean=float(numbers.mean()),
                std=float(numbers.std(ddof=1)) if len(numbers) > 1 else None,
                reached=sum(flag for curve, flag in flags if curve.method == method) if reached else None,
            )
        )
    return scores


def _differences(
    curves: Sequence[Curve], values: Sequence[float], *, base: str, level: float
) -> list[PairedDifference]:
    cells = _cells(curves, values)
    others = [method for method in cells if method != base]
    return [_difference(method, base, cells[method], cells[base], level=level) for method in others]


def _difference(method: str, baseline: str, cells: Cells, base: Cells, *, level: float) -> PairedDifference:
    pairs = np.array([cells[key] - base[key] for key in sorted(cells.keys() & base.keys())])
    std = float(pairs.std(ddof=1)) if len(pairs) > 1 else None
    shared = {task for task, _ in cells} & {task for task, _ in base}
    x, y = (_strata({key: value for key, value in scored.items() if key[0] in shared}) for scored in (cells, base))
    return PairedDifference(
        method=method,
        baseline=baseline,
        pairs=pairs.tolist(),
        mean=paired(pairs, level=level),
        std=std,
        detectable=None if std is None else detectable(std, len(pairs), level=level),
        probability_higher=bootstrap_higher(x, y, level=level) if shared else None,
    )


def _method(name: str, curves: Sequence[Curve]) -> Method:
    def median(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.median(known)) if known else None

    return Method(
        name=name,
        seeds=sorted(curve.seed for curve in curves),
        start=float(np.mean([curve.values[0] for curve in curves])),
        step_s=median([curve.step_s for curve in curves]),
        length_tokens=median([curve.length_tokens for curve in curves]),
    )


def _notes(curves: Sequence[Curve], names: Sequence[str]) -> list[str]:
    """Notes on how the runs were made: seeds, starts, and config keys that differ."""
    by_method = {name: [curve for curve in curves if curve.method == name] for name in names}
    notes = []
    seeds = {name: {(curve.task, curve.seed) for curve in group} for name, group in by_method.items()}
    if len({frozenset(pairs) for pairs in seeds.values()}) > 1:
        shared = reduce(set.intersection, seeds.values())
        notes.append(f"the methods have different seeds; {len(shared)} are shared by all, pairs use shared ones alone")
    starts: dict[tuple[str, int], set[float]] = {}
    for curve in curves:
        if curve.started:
            starts.setdefault((curve.task, curve.seed), set()).add(float(curve.values[0]))
    apart = sorted(seed for (_, seed), values in starts.items() if len(values) > 1)
    if apart:
        notes.append(f"seeds {_listed(apart)}: the methods differ before step 1, so they share no cold start")
    for name, group in by_method.items():
        keys = _changed(group, ("seed",))
        notes += [f"{name}: its runs also differ in {_listed(keys)}"] if keys else []
    keys = _changed([group[0] for group in by_method.values()], ("seed",))
    notes += [f"the methods differ in {_listed(keys)}"] if keys else []
    return notes


def _changed(curves: Sequence[Curve], ignored: Sequence[str]) -> list[str]:
    first, ignored = curves[0].config, [*FREE_KEYS, *ignored]
    return sorted({key for curve in curves[1:] for key in differences(first, curve.config, ignored=ignored)})


def _listed(items: Sequence[object]) -> str:
    shown = ", ".join(str(item) for item in items[:8])
    return shown + (f" and {len(items) - 8} more" if len(items) > 8 else "")
