"""Ratios of the policy to the one before the update, and the clip that several losses share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.errors import require
from rltrain.losses.config import LossConfig
from rltrain.types import TokenBatch


@dataclass(kw_only=True)
class ClipConfig(LossConfig):
    """Base of losses that clip the ratio to ``1 - clip_low .. 1 + clip_high``.

    With ``dual_clip`` c a negative advantage's objective is at least c·A (1912.09729); null turns it off.
    """

    clip_low: float = 0.2  # the ratio counts from 1 - clip_low on
    clip_high: float = 0.2  # the ratio counts up to 1 + clip_high
    dual_clip: float | None = None  # cap of the ratio where the advantage is negative; null: none

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.clip_low < 1, f"loss.clip_low={self.clip_low}: must lie in [0, 1)")
        require(self.clip_high >= 0, f"loss.clip_high={self.clip_high}: must be >= 0")
        require(
            self.dual_clip is None or self.dual_clip > 1,
            f"loss.dual_clip={self.dual_clip}: must be > 1 (3.0 is usual), or null to turn it off",
        )


def old_logprobs(logprobs_N: Tensor, batch: TokenBatch) -> Tensor:
    """Log-probs of the policy before the update, which is the current one where the batch names no other."""
    return logprobs_N.detach() if batch.old_logprobs_N is None else batch.old_logprobs_N


def log_ratios(logprobs_N: Tensor, batch: TokenBatch) -> Tensor:
    """``log pi - log pi_old`` of each token."""
    return logprobs_N - old_logprobs(logprobs_N, batch)


def over_sequences(values_N: Tensor, batch: TokenBatch, *, mean: bool = False) -> Tensor:
    """The sum (or mean) of the values of a token's completion, at each of its tokens."""
    sequences = len(batch.boundaries_S1) - 1
    totals_S = values_N.new_zeros(sequences).index_add(0, batch.sequence_N, values_N)
    if mean:
        counts_S = values_N.new_zeros(sequences).index_add(0, batch.sequence_N, torch.ones_like(values_N))
        totals_S = totals_S / counts_S.clamp(min=1)
    return totals_S[batch.sequence_N]


def clipped(log_ratio_N: Tensor, advantages_N: Tensor, config: ClipConfig) -> Tensor:
    """-min(rho·A, clip(rho, 1 - clip_low, 1 + clip_high)·A); with ``dual_clip`` c, for A < 0: -max(min(...), c·A)."""
    ratio_N = log_ratio_N.exp()
    clipped_N = ratio_N.clamp(1 - config.clip_low, 1 + config.clip_high)
    objective_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    if config.dual_clip is not None:
        floor_N = torch.where(advantages_N < 0, config.dual_clip * advantages_N, -torch.inf)
        objective_N = torch.maximum(objective_N, floor_N)
    return -objective_N


def clip_metrics(log_ratio_N: Tensor, advantages_N: Tensor, config: ClipConfig) -> dict[str, Tensor]:
    """Which tokens the clip takes the gradient of: ``clip_ratio/low_mean``, ``/high_mean``, ``/region_mean``."""
    ratio_N = log_ratio_N.detach().exp()
    low_N = (ratio_N < 1 - config.clip_low) & (advantages_N < 0)
    high_N = (ratio_N > 1 + config.clip_high) & (advantages_N > 0)
    return clip_shares(low_N, high_N)


def clip_shares(low_N: Tensor, high_N: Tensor) -> dict[str, Tensor]:
    """The metrics ``clip_ratio/*`` of tokens without gradient below and above."""
    return {
        "clip_ratio/low_mean": low_N,
        "clip_ratio/high_mean": high_N,
        "clip_ratio/region_mean": low_N | high_N,
    }
