"""The 80/20 rule: only the tokens of highest entropy are trained on (arXiv 2506.01939)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.group import as_rewards, group_advantages
from rltrain.advantages.written import among_zeros, written_entropies
from rltrain.config import AdvantageConfig
from rltrain.errors import require
from rltrain.registry import register
from rltrain.runtime import dist
from rltrain.types import Advantages, Context, Group, Max, Mean, Need


@dataclass(kw_only=True)
class EntropyMaskConfig(AdvantageConfig):
    """See :func:`entropy_mask`."""

    share: float = 0.2  # of the tokens, those of highest entropy, that is trained on
    eps: float = 1e-6  # added to the group's std

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, f"advantage.share={self.share}: must lie in (0, 1]; 1 keeps every token")
        require(self.eps >= 0, f"advantage.eps={self.eps}: must be >= 0")


def threshold(entropies_N: Tensor, share: float) -> tuple[float, float]:
    """The ``ceil(share·N)``-th largest entropy of all ranks, and N over the number of tokens that reach it.

    Ties are kept, so that more than the share may be. No tokens at all give infinity and 1. All ranks call it together.
    """
    total = int(dist.all_sum(torch.tensor(float(len(entropies_N))), name="tokens of the rollout"))
    if total == 0:
        return math.inf, 1.0
    wanted = math.ceil(share * total - 1e-9)  # 0.2 of 15 tokens is 3, not the 4 that rounding up 3.0000000000000004 is
    largest_here = entropies_N.topk(min(wanted, len(entropies_N))).values
    largest = torch.cat(dist.gather_objects(largest_here, name="largest entropies"))
    lowest = largest.topk(wanted).values[-1]
    kept = dist.all_sum((entropies_N >= lowest).sum().double(), name="tokens of high entropy")
    return float(lowest), total / float(kept)


@register("advantage", "entropy_mask", EntropyMaskConfig, needs={Need.ENTROPY})
def entropy_mask(groups: Sequence[Group], config: EntropyMaskConfig, context: Context) -> Advantages:
    r"""``A_i·N/N_kept`` on tokens whose entropy reaches :func:`threshold`, 0 elsewhere, float64.

    A_i is GRPO's advantage (sample std, ddof 1, plus ``eps``). N counts the written tokens of the whole rollout and all
    ranks, before it is split into minibatches, without completions that abstain. Under a token mean the loss is then
    the mean over the kept tokens. All rewards of a group equal gives exact zeros.
    """
    entropies = written_entropies(groups, context)
    counted = [
        entropy_W
        for group, row in zip(groups, entropies, strict=True)
        for entropy_W, abstains in zip(row, as_rewards(group.rewards_G).isnan().tolist(), strict=True)
        if not abstains
    ]
    entropies_N = torch.cat([torch.zeros(0, dtype=torch.float64), *counted])
    lowest, factor = threshold(entropies_N, config.share)
    values = []
    for group, row in zip(groups, entropies, strict=True):
        advantages_G = group_advantages(as_rewards(group.rewards_G), eps=config.eps)
        values.append(
            [
                among_zeros(torch.where(entropy_W >= lowest, advantage * factor, 0.0), completion)
                for advantage, entropy_W, completion in zip(advantages_G, row, group.completions, strict=True)
            ]
        )
    metrics = {"entropy_mask/kept_share": Mean.of(entropies_N >= lowest), "entropy_mask/threshold": Max(value=lowest)}
    return Advantages(values=values, metrics=metrics)
