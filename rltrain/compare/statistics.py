"""Interquartile mean, bootstrap, probability of improvement, paired differences. Arrays in, numbers out.

A *stratum* holds the scores of one method on one task, one per run. Strata are resampled independently
(Agarwal et al., 2108.13264, which also gives the interquartile mean and the probability of improvement).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RunScores = np.ndarray
RESAMPLES = 5000
POWER = 0.8


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and the ends of its interval."""

    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def interquartile_mean(strata: Sequence[RunScores]) -> np.ndarray:
    """Mean without the floor(n/4) lowest and highest of all n scores, over the last axis: below 4 scores, the mean."""
    pooled = np.sort(np.concatenate(strata, axis=-1), axis=-1)
    cut = pooled.shape[-1] // 4
    return pooled[..., cut : pooled.shape[-1] - cut].mean(axis=-1)


def probability_higher(strata: Sequence[tuple[RunScores, RunScores]]) -> np.ndarray:
    """P(X > Y) + P(X = Y)/2 of a run X against a run Y of the same task, over all pairs. Mean over tasks."""
    above = [np.sign(x[..., :, None] - y[..., None, :]).mean(axis=(-2, -1)) for x, y in strata]
    return (1 + np.mean(above, axis=0)) / 2


def bootstrap(
    strata: Sequence[RunScores], statistic: Callable[[Sequence[RunScores]], np.ndarray], *, level: float, seed: int = 0
) -> Interval:
    """Percentile interval of ``statistic`` over resamples of each stratum with replacement.

    With few runs it is too narrow: at n = 5 it covers the true value less often than ``level`` says.
    """
    generator = np.random.default_rng(seed)
    draws = [scores[generator.integers(len(scores), size=(RESAMPLES, len(scores)))] for scores in strata]
    tail = (1 - level) / 2
    low, high = np.quantile(statistic(draws), [tail, 1 - tail])
    return Interval(estimate=float(statistic(strata)), low=float(low), high=float(high))


def bootstrap_higher(x: Sequence[RunScores], y: Sequence[RunScores], *, level: float) -> Interval:
    """:func:`probability_higher` with its interval. ``x`` and ``y`` hold a stratum per task."""

    def halves(strata: Sequence[RunScores]) -> np.ndarray:
        return probability_higher(list(zip(strata[: len(x)], strata[len(x) :], strict=True)))

    return bootstrap([*x, *y], halves, level=level)


def paired(differences: RunScores, *, level: float) -> Interval | None:
    """Mean with Student's t interval, mean ± t·sd/sqrt(n), sd with ddof 1, None below two differences."""
    from scipy import stats

    count = len(differences)
    if count < 2:
        return None
    mean = float(differences.mean())
    half = float(stats.t.ppf((1 + level) / 2, count - 1) * differences.std(ddof=1) / np.sqrt(count))
    return Interval(estimate=mean, low=mean - half, high=mean + half)


def detectable(std: float, count: int, *, level: float) -> float:
    """The true mean difference that a paired t-test at 1 - ``level`` detects, in sign too, with 80 % probability.

    d with P(T > t) = 0.8, T noncentral t with n - 1 degrees of freedom and noncentrality d·sqrt(n)/sd.
    """
    from scipy import optimize, stats

    critical = float(stats.t.ppf((1 + level) / 2, count - 1))

    def missing(shift: float) -> float:
        return POWER - float(stats.nct.sf(critical, count - 1, shift))

    # Where the noncentrality is 4t + 4 the probability is 1 to three digits, whatever n.
    return float(optimize.brentq(missing, 0.0, 4 * critical + 4)) * std / np.sqrt(count)  # type: ignore[arg-type]
