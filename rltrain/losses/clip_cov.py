"""Clip-Cov: a few tokens of high covariance between advantage and log-prob get no gradient (2505.22617)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rltrain.errors import require
from rltrain.losses.covariance import drawn_within, selection
from rltrain.losses.ratios import ClipConfig, clip_metrics, clipped, log_ratios
from rltrain.losses.terms import LossTerms
from rltrain.registry import register
from rltrain.types import TokenBatch


@dataclass(kw_only=True)
class ClipCovConfig(ClipConfig):
    """See :func:`clip_cov`. ``share`` is of all loss tokens of a minibatch, rounded down, at least a single token."""

    share: float = 0.0002  # of all loss tokens of a minibatch, which get no gradient
    cov_low: float = 1.0  # tokens are drawn from those of a higher covariance
    cov_high: float = 5.0  # and of a lower covariance

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.share <= 1, f"loss.share={self.share}: must lie in (0, 1]; 0.0002 is the paper's")
        require(
            self.cov_low < self.cov_high,
            f"loss.cov_low={self.cov_low}: must be below loss.cov_high={self.cov_high}; 1 and 5 are the paper's",
        )

    def separable_surrogate(self) -> bool:
        return True

    def needs_old_logprobs(self) -> bool:
        return True

    def keeps_zero_advantages(self) -> bool:
        """They count in the means, and may be drawn."""
        return True

    def marked(self, batches: Sequence[TokenBatch], name: str) -> Sequence[TokenBatch]:
        return drawn_within(batches, low=self.cov_low, high=self.cov_high, share=self.share, name=name)


@register("loss", "clip_cov", ClipCovConfig)
def clip_cov(logprobs_N: Tensor, batch: TokenBatch, config: ClipCovConfig) -> LossTerms:
    """The clip of :func:`~rltrain.losses.ratios.clipped`, and 0 at the selected tokens.

    Selected are ``share``·N tokens, drawn from those with ``cov_low`` < cov < ``cov_high``, where
    cov = (A - mean A)·(log pi_old - mean log pi_old), means over the N tokens of the minibatch
    (:mod:`rltrain.losses.covariance`).
    """
    log_ratio_N, selected_N = log_ratios(logprobs_N, batch), selection(batch)
    loss_N = clipped(log_ratio_N, batch.advantages_N, config).masked_fill(selected_N, 0.0)
    metrics_N = clip_metrics(log_ratio_N, batch.advantages_N, config)
    return LossTerms(loss_N=loss_N, metrics_N=metrics_N | {"loss/selected": selected_N})
