"""FIPO: a token counts more where the rest of its completion became likelier (2603.19835)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.errors import require
from rltrain.losses.ratios import ClipConfig, clip_metrics, clipped, log_ratios
from rltrain.losses.terms import LossTerms
from rltrain.registry import register
from rltrain.types import TokenBatch


@dataclass(kw_only=True)
class FipoConfig(ClipConfig):
    """See :func:`fipo`. ``half_life_tokens``: how far ahead a token's log ratio counts by half."""

    half_life_tokens: float = 32.0  # distance at which a later token's log ratio counts by half
    weight_low: float = 1.0  # smallest weight of a token
    weight_high: float = 1.2  # largest weight of a token

    def __post_init__(self) -> None:
        super().__post_init__()
        half_life, low, high = self.half_life_tokens, self.weight_low, self.weight_high
        require(half_life > 0, f"loss.half_life_tokens={half_life}: must be > 0; 32 is the paper's")
        require(0 <= low <= 1, f"loss.weight_low={low}: must lie in [0, 1]; 1.0 is the paper's")
        require(high >= 1, f"loss.weight_high={high}: must be >= 1; 1.2 is the paper's")

    def idle_at_ratio_one(self) -> bool:
        return True


@register("loss", "fipo", FipoConfig)
def fipo(logprobs_N: Tensor, batch: TokenBatch, config: FipoConfig) -> LossTerms:
    """``w_t`` times the clip of :func:`~rltrain.losses.ratios.clipped`, w without gradient.

    w_t = clip(exp(sum_{k >= t} 2^(-(k-t)/half_life)·(log pi_k - log pi_old,k)), weight_low, weight_high), k over the
    tokens of t's completion.
    """
    log_ratio_N = log_ratios(logprobs_N, batch)
    future_N = discounted_future(log_ratio_N.detach(), batch.sequence_N, half_life_tokens=config.half_life_tokens)
    weight_N = future_N.exp().clamp(config.weight_low, config.weight_high)
    metrics_N = clip_metrics(log_ratio_N, batch.advantages_N, config)
    return LossTerms(
        loss_N=weight_N * clipped(log_ratio_N, batch.advantages_N, config),
        metrics_N=metrics_N | {"fipo/weight": weight_N},
    )


def discounted_future(values_N: Tensor, sequence_N: Tensor, *, half_life_tokens: float) -> Tensor:
    """``sum_{k >= t} 2^(-(k-t)/half_life)·x_k`` over the tokens k of t's completion, which lie one after the other.

    By doubling: after round j a token holds the sum of its next 2^j tokens, so that a round is one shifted addition.
    """
    starts_N = torch.ones_like(sequence_N, dtype=torch.bool)
    starts_N[1:] = sequence_N[1:] != sequence_N[:-1]
    run_N = starts_N.cumsum(0)
    longest, reach = int(run_N.bincount().max()), 1
    sums_N = values_N.double()
    while reach < longest:
        further_N = torch.zeros_like(sums_N)
        further_N[:-reach] = sums_N[reach:].masked_fill(run_N[reach:] != run_N[:-reach], 0.0)
        sums_N = sums_N + 2.0 ** (-reach / half_life_tokens) * further_N
        reach *= 2
    return sums_N.to(values_N.dtype)
