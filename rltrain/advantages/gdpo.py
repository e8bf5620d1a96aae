"""GDPO: every reward is normalised in its group by itself, then their weighted sum is whitened (arXiv 2601.05242)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.group import as_rewards, group_advantages, per_token
from rltrain.advantages.whitening import whiten
from rltrain.config import AdvantageConfig
from rltrain.errors import RunError, require
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group


@dataclass(kw_only=True)
class GDPOConfig(AdvantageConfig):
    """See :func:`gdpo`. ``eps`` is added to the standard deviations of a group, ``whitening_eps`` to the batch's."""

    eps: float = 1e-6  # added to the std of each reward in its group
    whitening_eps: float = 1e-8  # added to the std of the batch

    def __post_init__(self) -> None:
        require(self.eps >= 0, f"advantage.eps={self.eps}: must be >= 0")
        require(
            self.whitening_eps > 0,
            f"advantage.whitening_eps={self.whitening_eps}: must be > 0, a batch of equal rewards has std 0",
        )

    def learns_from_equal_rewards(self) -> bool:
        return True  # parts may differ where their sum does not


def decoupled(group: Group, weights: Mapping[str, float], *, eps: float) -> Tensor:
    """``sum_k w_k·(r_ik - mean(r_k)) / (std(r_k) + eps)`` over the group's rewards k, float64, shape [G].

    Sample std (ddof 1). A reward whose values are all equal gives 0. One that abstains on the whole group does not
    apply to it. A completion whose total reward abstains (NaN) leaves all statistics and gets 0. A weight that is not
    given is 1. ``RunError`` for a group that knows its total reward alone.
    """
    total_G = as_rewards(group.rewards_G)
    if not group.reward_parts:
        raise RunError(
            f"advantage=gdpo: problem {group.prompt.problem.id}: its rewards by name are not known here, only their "
            "sum; train with rltrain.train"
        )
    summed_G = torch.zeros_like(total_G)
    for name, scores_G in group.reward_parts.items():
        counted_G = as_rewards(scores_G).masked_fill(total_G.isnan(), torch.nan)
        summed_G += weights.get(name, 1.0) * group_advantages(counted_G, eps=eps)
    return summed_G


@register("advantage", "gdpo", GDPOConfig)
def gdpo(groups: Sequence[Group], config: GDPOConfig, context: Context) -> Advantages:
    r"""``A_i = (S_i - mean_B(S)) / (std_B(S) + whitening_eps)`` with S of :func:`decoupled`, on every token of i.

    mean_B and std_B (ddof 0) run over the completions of the whole rollout and all ranks whose reward counts, each
    once whatever its length. The weights are those of the run's rewards (``rewards.NAME.weight``).
    """
    sums = [decoupled(group, context.reward_weights, eps=config.eps) for group in groups]
    counted = [~as_rewards(group.rewards_G).isnan() for group in groups]
    rows = [summed_G[counted_G] for summed_G, counted_G in zip(sums, counted, strict=True)]
    whitened = whiten(rows, eps=config.whitening_eps, name="GDPO")
    values = []
    for group, counted_G, row in zip(groups, counted, whitened, strict=True):
        advantages_G = torch.zeros(len(counted_G), dtype=torch.float64)
        advantages_G[counted_G] = row
        values.append(per_token(advantages_G, group.completion_ids))
    return Advantages(values=values)
