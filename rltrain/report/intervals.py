"""95 % intervals of held-out metrics, over problems."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rltrain.compare.statistics import Interval, paired
from rltrain.runs.metrics import wilson

LEVEL = 0.95


def of_mean(values: Sequence[float]) -> Interval | None:
    """Of the mean over problems: Wilson's score interval where each value is 0 or 1, else Student's t (ddof 1).

    None below two values.
    """
    if len(values) < 2:
        return None
    if set(values) <= {0.0, 1.0}:
        return of_share(sum(values) / len(values), len(values))
    return paired(np.array(values, dtype=float), level=LEVEL)


def of_share(share: float, count: int) -> Interval:
    """Wilson's score interval (:func:`~rltrain.runs.metrics.wilson`)."""
    low, high = wilson(share, count)
    return Interval(estimate=share, low=low, high=high)


def of_change(before: Sequence[float], after: Sequence[float]) -> Interval | None:
    """Of the mean difference over the same problems, by Student's t on the differences. None where all are equal."""
    differences = np.subtract(after, before, dtype=float)
    return paired(differences, level=LEVEL) if differences.any() else None


def of_difference(before: Sequence[float], after: Sequence[float]) -> Interval | None:
    """Of mean(after) - mean(before) of different problems. None where a side has fewer than two values.

    Where each value is 0 or 1, Newcombe's hybrid score interval: d - sqrt((p - l)² + (U - q)²) to
    d + sqrt((u - p)² + (q - L)²), with q of before, p of after and their Wilson intervals (L, U) and (l, u). Else
    Welch's: d ± t·sqrt(s²/n + S²/N), ddof 1, t at the degrees of freedom of Welch and Satterthwaite.
    """
    first, last = of_mean(before), of_mean(after)
    if first is None or last is None:
        return None
    change = last.estimate - first.estimate
    if {*before, *after} <= {0.0, 1.0}:
        down = math.hypot(last.estimate - last.low, first.high - first.estimate)
        up = math.hypot(last.high - last.estimate, first.estimate - first.low)
        return Interval(estimate=change, low=change - down, high=change + up)
    half = _welch(np.array(before, dtype=float), np.array(after, dtype=float))
    return Interval(estimate=change, low=change - half, high=change + half)


def _welch(before: np.ndarray, after: np.ndarray) -> float:
    from scipy import stats

    shares = [values.var(ddof=1) / len(values) for values in (before, after)]
    if not sum(shares):
        return 0.0
    freedom = sum(shares) ** 2 / sum(
        share**2 / (len(values) - 1) for share, values in zip(shares, (before, after), strict=True)
    )
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom) * math.sqrt(sum(shares)))
