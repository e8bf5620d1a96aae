"""The loss of most presets: clip, CISPO or REINFORCE, with a ratio per token or per sequence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rltrain.errors import require, require_one_of
from rltrain.losses.ratios import ClipConfig, clip_metrics, clipped, log_ratios, over_sequences
from rltrain.losses.terms import LossTerms
from rltrain.registry import register
from rltrain.types import TokenBatch


@dataclass(kw_only=True)
class SurrogateConfig(ClipConfig):
    """See :func:`surrogate`; presets are the YAML files of ``configs/algorithm``."""

    ratio: str = "token"  # of probabilities new/old, by token or by sequence (GSPO)
    surrogate: str = "clip"  # clip (PPO), cispo, or reinforce

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(("token", "sequence"), "loss.ratio", self.ratio)
        require_one_of(("clip", "cispo", "reinforce"), "loss.surrogate", self.surrogate)
        require(
            not (self.ratio == "sequence" and self.surrogate != "clip"),
            f"loss.ratio=sequence with loss.surrogate={self.surrogate}: undefined; set loss.surrogate=clip",
        )

    def separable_surrogate(self) -> bool:
        """Not where a sequence's tokens share a ratio."""
        return self.ratio == "token"


@register("loss", "surrogate", SurrogateConfig)
def surrogate(logprobs_N: Tensor, batch: TokenBatch, config: SurrogateConfig) -> LossTerms:
    """``clip``: :func:`~rltrain.losses.ratios.clipped`. ``reinforce``: -A·log pi.

    ``cispo`` (2506.13585): -sg(min(rho, 1 + clip_high))·A·log pi. With ``ratio="sequence"`` rho is
    exp(mean log ratio of the completion's tokens) (GSPO, 2507.18071).
    """
    log_ratio_N = log_ratios(logprobs_N, batch)
    if config.ratio == "sequence":
        log_ratio_N = over_sequences(log_ratio_N, batch, mean=True)
    return LossTerms(
        loss_N=_term(logprobs_N, log_ratio_N, batch.advantages_N, config),
        metrics_N=clip_metrics(log_ratio_N, batch.advantages_N, config),
    )


def _term(logprobs_N: Tensor, log_ratio_N: Tensor, advantages_N: Tensor, config: SurrogateConfig) -> Tensor:
    if config.surrogate == "reinforce":
        return -advantages_N * logprobs_N
    if config.surrogate == "cispo":
        return -log_ratio_N.exp().detach().clamp(max=1 + config.clip_high) * advantages_N * logprobs_N
    return clipped(log_ratio_N, advantages_N, config)
