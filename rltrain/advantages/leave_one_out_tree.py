"""The leave-one-out prefix tree: the reward minus what the others through the same prefix got."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.group import as_rewards
from rltrain.advantages.prefix_tree import TokenIds, common_prefixes, leave_one_out_values
from rltrain.batching.zero_variance import is_zero_variance
from rltrain.config import AdvantageConfig
from rltrain.errors import require, require_one_of
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group


@dataclass(kw_only=True)
class LeaveOneOutTreeConfig(AdvantageConfig):
    """See :func:`leave_one_out_tree_advantages`."""

    kappa: float = 1.0  # weight of the shorter prefix's value, in completions
    scale: str = "none"  # std divides by the group's std + eps, none does not
    eps: float = 1e-6  # added to the std

    def __post_init__(self) -> None:
        require(self.kappa > 0, f"advantage.kappa={self.kappa}: must be > 0; 1 is usual")
        require_one_of(("std", "none"), "advantage.scale", self.scale)
        require(self.eps >= 0, f"advantage.eps={self.eps}: must be >= 0")


def leave_one_out_tree_advantages(
    completion_ids: Sequence[TokenIds],
    rewards: Sequence[float | None] | Tensor,
    *,
    kappa: float = 1.0,
    scale: str = "none",
    eps: float = 1e-6,
) -> list[Tensor]:
    r"""``A_{i,t} = (r_i - T(s_t)) / (std(r) + eps)``, float64, one tensor [T] per completion.

    T is :func:`~rltrain.advantages.prefix_tree.leave_one_out_values`, which knows the other completions and the prefix,
    not the token that follows. Without the division by std (``scale="none"``, or sample std, ddof 1) it is unbiased.

    NaN or None rewards abstain: they leave the tree and the statistics and get 0. Fewer than two rewards that count,
    or all equal, give exact zeros.
    """
    rewards_G = as_rewards(rewards)
    if is_zero_variance(rewards_G):
        return [torch.zeros(len(ids), dtype=torch.float64) for ids in completion_ids]
    divisor = rewards_G[~rewards_G.isnan()].std(correction=1) + eps if scale == "std" else torch.ones(())
    values = leave_one_out_values(common_prefixes(completion_ids), rewards_G, kappa=kappa)
    return [
        torch.zeros_like(value_T) if reward.isnan() else (reward - value_T) / divisor
        for reward, value_T in zip(rewards_G, values, strict=True)
    ]


@register("advantage", "leave_one_out_tree", LeaveOneOutTreeConfig)
def leave_one_out_tree(groups: Sequence[Group], config: LeaveOneOutTreeConfig, context: Context) -> Advantages:
    """:func:`leave_one_out_tree_advantages` of every group."""
    values = [
        leave_one_out_tree_advantages(
            group.completion_ids, as_rewards(group.rewards_G), kappa=config.kappa, scale=config.scale, eps=config.eps
        )
        for group in groups
    ]
    return Advantages(values=values)
