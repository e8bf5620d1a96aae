"""KL-Cov: a penalty on moving the tokens of the highest covariance of advantage and log-prob (2505.22617)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rltrain.errors import require
from rltrain.losses.config import LossConfig
from rltrain.losses.covariance import largest, selection
from rltrain.losses.ratios import log_ratios
from rltrain.losses.terms import LossTerms
from rltrain.registry import register
from rltrain.types import TokenBatch


@dataclass(kw_only=True)
class KlCovConfig(LossConfig):
    """See :func:`kl_cov`. ``share`` is of all loss tokens of a minibatch, rounded down, at least a single token."""

    share: float = 0.0002  # of all loss tokens of a minibatch, which pay for moving
    penalty: float = 1.0  # weight of abs(log pi - log pi_old)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.share <= 1, f"loss.share={self.share}: must lie in (0, 1]; 0.0002 to 0.002 are the paper's")
        require(0 <= self.penalty < math.inf, f"loss.penalty={self.penalty}: must be >= 0; 1.0 is the paper's")

    def separable_surrogate(self) -> bool:
        return True

    def needs_old_logprobs(self) -> bool:
        return True

    def keeps_zero_advantages(self) -> bool:
        """They count in the means, and the penalty moves them."""
        return True

    def idle_at_ratio_one(self) -> bool:
        return True

    def marked(self, batches: Sequence[TokenBatch], name: str) -> Sequence[TokenBatch]:
        return largest(batches, share=self.share)


@register("loss", "kl_cov", KlCovConfig)
def kl_cov(logprobs_N: Tensor, batch: TokenBatch, config: KlCovConfig) -> LossTerms:
    """-rho·A, and ``penalty``·abs(log pi - log pi_old) more at the selected tokens; no clip.

    Selected are the ``share``·N tokens of the largest cov (:mod:`rltrain.losses.covariance`). At rho = 1 the penalty
    and its gradient are 0.
    """
    log_ratio_N, selected_N = log_ratios(logprobs_N, batch), selection(batch)
    penalty_N = config.penalty * log_ratio_N.abs()
    loss_N = -log_ratio_N.exp() * batch.advantages_N + penalty_N.where(selected_N, 0.0)
    return LossTerms(loss_N=loss_N, metrics_N={"loss/selected": selected_N})
