"""How well predicted values are calibrated: means of prediction and outcome by bin of the prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BINS = 10
VALUES = "predicted_value"  # the note of a held-out completion: V before each token


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """The predictions of a bin: their mean, the mean outcome, and how many they are."""

    predicted: float
    observed: float
    count: int


def calibration(values: Sequence[float], rewards: Sequence[float], *, bins: int = BINS) -> list[CalibrationBin]:
    """Bins of equal width between 0 and 1, or between the extremes of values and rewards where these lie outside.

    Empty bins are left out, and so are pairs with a NaN.
    """
    pairs = [pair for pair in zip(values, rewards, strict=True) if not any(map(math.isnan, pair))]
    every = [number for pair in pairs for number in pair]
    low, high = min([0.0, *every]), max([1.0, *every])
    inside: dict[int, list[tuple[float, float]]] = {}
    for value, reward in pairs:
        inside.setdefault(min(bins - 1, int((value - low) / (high - low) * bins)), []).append((value, reward))
    return [
        CalibrationBin(
            predicted=sum(value for value, _ in some) / len(some),
            observed=sum(reward for _, reward in some) / len(some),
            count=len(some),
        )
        for _, some in sorted(inside.items())
    ]


def expected_calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """``Σ_b count_b·|predicted_b - observed_b| / Σ_b count_b``; NaN without any."""
    count = sum(each.count for each in bins)
    gaps = sum(each.count * abs(each.predicted - each.observed) for each in bins)
    return gaps / count if count else math.nan
