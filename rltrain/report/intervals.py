"""95 % intervals of held-out metrics, over problems."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rltrain.compare.statistics import Interval, paired

LEVEL, Z = 0.95, 1.959964


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
    """Wilson's score interval: (p + z²/2n ± z·sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n), z = 1.96."""
    spread = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    middle, scale = share + Z**2 / (2 * count), 1 + Z**2 / count
    return Interval(estimate=share, low=(middle - spread) / scale, high=(middle + spread) / scale)


def of_change(before: Sequence[float], after: Sequence[float]) -> Interval | None:
    """Of the mean difference over the same problems, by Student's t on the differences. None where all are equal."""
    differences = np.subtract(after, before, dtype=float)
    return paired(differences, level=LEVEL) if differences.any() else None
