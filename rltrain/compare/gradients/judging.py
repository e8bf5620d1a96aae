"""An estimator against the true policy gradient: sampled groups in, one record per family out.

The estimate of a batch is (1/B)·sum_i sum_t A_it·grad log pi(token_it | prefix_it) over its B completions; the loss's
length weights are left aside. With m = E[estimate] and the true gradient g:

    cosine = cos(m, g)        scale = <m, g>/|g|²        bias = |m - g|/|g|
    variance = trace of the covariance of the estimate, times B
    SNR = (<m, g>/|g|)²/variance, what one completion is worth, whatever the scale
    SNR per token = SNR over the tokens generated per completion, those of continuations included

|m|² comes from pairs of different batches (a U-statistic), so that sampling noise does not pass for bias. Intervals are
95 % bootstrap over batches. All estimators see the same samples at the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from rltrain.advantages.estimator import Estimator, EstimatorLike, estimator_of
from rltrain.compare.gradients.families import FAMILIES, Family, TabularPolicy, enumerated
from rltrain.compare.gradients.services import PROVIDED, Table
from rltrain.compare.statistics import Interval
from rltrain.errors import require
from rltrain.types import Group, Need, Problem, Prompt

PROMPT = Prompt(problem=Problem(id="p", prompt="", answer="1"), token_ids=(1,))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How much is drawn: ``completions`` in groups of ``group_size``, handed to the estimator ``batch`` at a time."""

    group_size: int = 4
    completions: int = 8192
    batch: int = 256
    resamples: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = f"completions={self.completions}, batch={self.batch}, group_size={self.group_size}"
        fits = self.completions % self.batch == 0 and self.batch % self.group_size == 0
        require(fits, f"{sizes}: batch must divide completions, and group_size must divide batch")
        enough = self.completions // self.batch >= 2
        require(enough, f"{sizes}: the intervals need at least two batches; raise completions or lower batch")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One estimator on one family at one group size; the columns of the module's docstring with 95 % intervals."""

    family: str
    group_size: int
    cosine: Interval
    scale: Interval
    bias: Interval
    variance: Interval
    snr: Interval
    tokens: Interval
    snr_per_token: Interval


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """One gradient estimate per batch, and the tokens generated for it per completion, continuations included."""

    gradients_KD: np.ndarray
    tokens_K: np.ndarray


def judge(
    estimator: EstimatorLike,
    options: Mapping[str, Any] | None = None,
    *,
    families: Sequence[Family] = FAMILIES,
    group_size: int = 4,
    completions: int = 8192,
    batch: int = 256,
    resamples: int = 400,
    seed: int = 0,
) -> dict[str, Judgement]:
    """Judgements by the family's name, of a function ``f(groups, options, context)``, a registered name or a config.

    ``options`` are what the function gets, or the settings of a name. What the estimator raises is raised, an
    ``EstimatorError`` for a result that does not fit; ``ConfigError`` for sizes that do not divide and for an estimator
    that needs more than a table can give.
    """
    sampling = Sampling(group_size=group_size, completions=completions, batch=batch, resamples=resamples, seed=seed)
    called = estimator_of(estimator, options)
    return {family.name: judge_on(policy_of(family, seed), called, sampling) for family in families}


@lru_cache(maxsize=32)
def policy_of(family: Family, seed: int) -> TabularPolicy:
    """:func:`enumerated`, once for all estimators."""
    return enumerated(family, seed)


WARM_UP_BATCHES = 10  # an estimator that keeps a state is judged with one that has settled


def judge_on(policy: TabularPolicy, estimator: Estimator, sampling: Sampling) -> Judgement:
    """One judgement."""
    missing = ", ".join(sorted(need.name for need in estimator.needs - PROVIDED))
    require(not missing, f"{estimator.name}: needs {missing}, which a tabular policy does not give")
    table = Table(policy=policy, seed=sampling.seed)
    if Need.STATE in estimator.needs:
        early = _draws(policy, sampling, WARM_UP_BATCHES * sampling.batch, stream=1)
        estimates(table, estimator, early, sampling.batch)
    found = estimates(table, estimator, _draws(policy, sampling, sampling.completions), sampling.batch)
    columns = measure(found, policy.true_gradient, sampling.batch, sampling.resamples, sampling.seed)
    return Judgement(family=policy.family.name, group_size=sampling.group_size, **columns)


def _draws(policy: TabularPolicy, sampling: Sampling, completions: int, stream: int | None = None) -> np.ndarray:
    """Indices of completions, [groups, G]."""
    generator = np.random.default_rng([sampling.seed, sampling.group_size, *([stream] if stream else [])])
    shape = completions // sampling.group_size, sampling.group_size
    return generator.choice(len(policy.completions), shape, p=policy.probability_C)


def estimates(table: Table, estimator: Estimator, draws: np.ndarray, batch: int) -> Estimates:
    """The estimator on batches of ``batch`` completions; ``draws`` is [groups, G]."""
    policy, rewards_C, generated = table.policy, torch.from_numpy(table.policy.reward_C), table.continuer.tokens
    rows, tokens = [], []
    for drawn in draws.reshape(-1, batch // draws.shape[1], draws.shape[1]):
        groups = [
            Group(
                prompt=PROMPT,
                completions=tuple(policy.sampled[i] for i in row),
                rewards_G=rewards_C[row],
                reward_parts={"reward": rewards_C[row]},
            )
            for row in drawn
        ]
        before = generated[0]
        values = estimator(groups, table.context).values
        weights = torch.cat([row_T for group in values for row_T in group]).double().numpy() / batch
        rows.append(policy.gradient(drawn.ravel().tolist(), weights))
        written = sum(completion.written_tokens for group in groups for completion in group.completions)
        tokens.append((written + generated[0] - before) / batch)
    return Estimates(gradients_KD=np.array(rows), tokens_K=np.array(tokens))


def measure(found: Estimates, truth_D: np.ndarray, batch: int, resamples: int, seed: int) -> dict[str, Interval]:
    """The columns; weights_RK[0] is the sample itself, the others are bootstrap resamples of batches."""
    estimates_KD = found.gradients_KD
    count = len(estimates_KD)
    generator = np.random.default_rng(seed)
    weights_RK = np.vstack([np.ones(count), generator.multinomial(count, np.full(count, 1 / count), resamples)]) / count
    square_K = (estimates_KD**2).sum(1)
    mean_RD = weights_RK @ estimates_KD
    # Pairs of one batch with itself are left out, in the resamples too: they hold noise, not signal.
    same_R = (weights_RK**2).sum(1)
    norm2_R = ((mean_RD**2).sum(1) - weights_RK**2 @ square_K) / (1 - same_R)
    truth2 = float(truth_D @ truth_D)
    along_R = mean_RD @ truth_D
    variance_R = batch * (weights_RK @ square_K - norm2_R)
    columns_R = {
        "cosine": np.clip(along_R / np.sqrt(np.maximum(norm2_R, 1e-300) * truth2), -1, 1),
        "scale": along_R / truth2,
        "bias": np.sqrt(np.maximum(norm2_R - 2 * along_R + truth2, 0) / truth2),
        "variance": variance_R,
        "snr": along_R**2 / truth2 / np.maximum(variance_R, 1e-300),
        "tokens": weights_RK @ found.tokens_K,
    }
    columns_R["snr_per_token"] = columns_R["snr"] / columns_R["tokens"]
    return {name: _interval(values_R) for name, values_R in columns_R.items()}


def _interval(values_R: np.ndarray) -> Interval:
    low, high = np.quantile(values_R[1:], [0.025, 0.975])
    return Interval(estimate=float(values_R[0]), low=float(low), high=float(high))
