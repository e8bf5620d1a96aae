"""DPPO with total variation: no gradient where a token's probability has moved too far (2602.04879)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from rltrain.errors import require
from rltrain.losses.config import LossConfig
from rltrain.losses.ratios import clip_shares, log_ratios, old_logprobs
from rltrain.losses.terms import LossTerms
from rltrain.registry import register
from rltrain.types import TokenBatch


@dataclass(kw_only=True)
class DppoTvConfig(LossConfig):
    """See :func:`dppo_tv`. ``ratio_cap`` bounds the weight of a rare token that became likely; null: no bound."""

    tv_low: float = 0.2  # fall of a token's probability beyond which a negative advantage stops counting
    tv_high: float = 0.2  # rise of a token's probability beyond which a positive advantage stops counting
    ratio_cap: float | None = 20.0  # largest weight of a token; null: no bound

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("tv_low", "tv_high"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"loss.{key}={value}: must lie in [0, 1]; 0.2 is the paper's")
        cap = self.ratio_cap
        require(cap is None or 1 <= cap < math.inf, f"loss.ratio_cap={cap}: must be >= 1; 20.0 is usual, null is off")

    def separable_surrogate(self) -> bool:
        return True

    def idle_at_ratio_one(self) -> bool:
        return True


@register("loss", "dppo_tv", DppoTvConfig)
def dppo_tv(logprobs_N: Tensor, batch: TokenBatch, config: DppoTvConfig) -> LossTerms:
    """-sg(min(rho, cap)·m)·A·log pi, with rho = pi/pi_old of the sampled token.

    m = 0 where A > 0 and pi - pi_old > ``tv_high``, or A <= 0 and pi - pi_old < -``tv_low``, else 1. The difference of
    the sampled token's probabilities is the total variation of "this token or another".
    """
    now_N, advantages_N = logprobs_N.detach(), batch.advantages_N
    moved_N = now_N.exp() - old_logprobs(logprobs_N, batch).exp()
    high_N = (advantages_N > 0) & (moved_N > config.tv_high)
    low_N = (advantages_N <= 0) & (moved_N < -config.tv_low)
    ratio_N = log_ratios(now_N, batch).exp().clamp(max=config.ratio_cap)
    weight_N = ratio_N.masked_fill(low_N | high_N, 0.0)
    shares = clip_shares(low_N & (advantages_N != 0), high_N)
    return LossTerms(loss_N=-weight_N * advantages_N * logprobs_N, metrics_N=shares)
