"""GTPO in its practical form: the group advantage, weighted by a token's entropy (arXiv 2508.04349)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.group import as_rewards, group_advantages
from rltrain.advantages.written import among_zeros, written_entropies
from rltrain.config import AdvantageConfig
from rltrain.errors import require, require_one_of
from rltrain.registry import register
from rltrain.runtime import dist
from rltrain.types import Advantages, Context, Group, Need


@dataclass(kw_only=True)
class GTPOConfig(AdvantageConfig):
    """See :func:`entropy_factors`. ``mean_over`` says which tokens the mean entropy is of: completion or batch."""

    beta: float = 0.1  # how much entropy counts; 0 is GRPO
    mean_over: str = "completion"  # mean entropy of the completion, or of the batch
    eps: float = 1e-6  # added to the group's std

    def __post_init__(self) -> None:
        require(self.beta >= 0, f"advantage.beta={self.beta}: must be >= 0; 0 is GRPO")
        require_one_of(("completion", "batch"), "advantage.mean_over", self.mean_over)
        require(self.eps >= 0, f"advantage.eps={self.eps}: must be >= 0")


def entropy_factors(entropy_T: Tensor, mean: float, beta: float) -> Tensor:
    r"""``max(0, 1 + beta·(H_t / mean - 1))``, float64, shape [T]; 1 where the mean entropy is 0."""
    if mean <= 0:
        return torch.ones(len(entropy_T), dtype=torch.float64)
    return (1 + beta * (entropy_T.double() / mean - 1)).clamp(min=0)


@register("advantage", "gtpo", GTPOConfig, needs={Need.ENTROPY})
def gtpo(groups: Sequence[Group], config: GTPOConfig, context: Context) -> Advantages:
    r"""``A_i·max(0, 1 + beta·(H_t / mean(H) - 1))``, float64.

    A_i is GRPO's advantage (sample std, ddof 1, plus ``eps``). The mean is over the completion's written tokens (a
    choice of ours), or over those of the whole rollout and all ranks, without completions that abstain. Where no factor
    is cut at 0 a completion's mean advantage is A_i. NaN rewards abstain and get 0. All rewards equal gives exact
    zeros.
    """
    entropies = written_entropies(groups, context)
    advantages = [group_advantages(as_rewards(group.rewards_G), eps=config.eps) for group in groups]
    batch_mean = _batch_mean(groups, entropies) if config.mean_over == "batch" else None
    values = [
        [
            among_zeros(advantage * entropy_factors(entropy_W, _mean(entropy_W, batch_mean), config.beta), completion)
            for advantage, entropy_W, completion in zip(advantages_G, row, group.completions, strict=True)
        ]
        for advantages_G, row, group in zip(advantages, entropies, groups, strict=True)
    ]
    return Advantages(values=values)


def _mean(entropy_T: Tensor, batch_mean: float | None) -> float:
    if batch_mean is not None:
        return batch_mean
    return float(entropy_T.mean()) if len(entropy_T) else 0.0


def _batch_mean(groups: Sequence[Group], entropies: Sequence[Sequence[Tensor]]) -> float:
    """Over the tokens of all ranks whose reward counts."""
    sums = torch.zeros(2, dtype=torch.float64)
    for group, row in zip(groups, entropies, strict=True):
        for entropy_T, abstains in zip(row, as_rewards(group.rewards_G).isnan().tolist(), strict=True):
            if not abstains:
                sums += torch.tensor([float(entropy_T.sum()), float(len(entropy_T))], dtype=torch.float64)
    total, count = dist.all_sum(sums, name="mean entropy of the rollout").tolist()
    return total / count if count else 0.0
