"""95 % intervals of held-out metrics, over problems."""

from __future__ import annotations

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
