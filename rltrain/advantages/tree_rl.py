"""TreeRL: what a stretch of the tree is worth against the root and against its parent (arXiv 2506.11902)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.group import as_rewards, group_advantages
from rltrain.advantages.prefix_tree import (
    TokenIds,
    common_prefixes,
    leaf_counts,
    leaves_per_token,
    node_starts,
    node_values,
)
from rltrain.advantages.written import written_mask
from rltrain.batching.zero_variance import is_zero_variance
from rltrain.config import AdvantageConfig
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group


@dataclass(kw_only=True)
class TreeRLConfig(AdvantageConfig):
    """See :func:`tree_rl_advantages`."""

    divide_by_leaves: bool = True  # by the root of the number of completions that share the token


def tree_rl_advantages(
    completion_ids: Sequence[TokenIds],
    rewards: Sequence[float | None] | Tensor,
    *,
    divide_by_leaves: bool = True,
    written: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    r"""``A_t = (R_t - mean(R)) / sqrt(n)``, float64, one tensor [T] per completion.

        l_i = r_i - mean of the other leaves' rewards              V(s) = mean of l over the n leaves through s
        R_t = (V(s_{t+1}) - V(root)) + (V(s_{t+1}) - V(parent))    n: leaves through s_{t+1}

    A node is a stretch of tokens that the same completions share. The parent is the stretch before it, or the root.
    mean(R) runs over the tokens of all completions of the group, a shared token once per leaf, so that the sum of
    ``sqrt(n)·A_t`` over them is 0. Where masks [T] ``written`` are given it runs over the tokens that they mark.
    ``divide_by_leaves=False`` leaves the root of n out.

    NaN or None rewards abstain: they are no leaves and get 0. Fewer than two rewards that count, or all equal, give
    exact zeros.
    """
    rewards_G = as_rewards(rewards)
    common_GG, counted_G = common_prefixes(completion_ids), ~rewards_G.isnan()
    rows = [torch.zeros(int(length), dtype=torch.float64) for length in common_GG.diagonal()]
    if is_zero_variance(rewards_G):
        return rows
    leaves_G = group_advantages(rewards_G, baseline="leave_one_out", scale="none")
    leaves_G[~counted_G] = torch.nan
    values, counts = node_values(common_GG, leaves_G), leaf_counts(common_GG, counted_G)
    leaves = counted_G.nonzero().flatten().tolist()
    for i in leaves:
        rows[i] = _node_rewards(values[i], counts[i])
    mean = torch.cat([rows[i] if written is None else rows[i][written[i]] for i in leaves]).mean()
    for i in leaves:
        rows[i] = (rows[i] - mean) / (counts[i][1:].double().sqrt() if divide_by_leaves else 1)
    return rows


def _node_rewards(values_T1: Tensor, counts_T1: Tensor) -> Tensor:
    """``2·V(s_{t+1}) - V(root) - V(parent)`` of each token, [T]."""
    depth_T1 = torch.arange(len(values_T1))
    first_T1 = torch.where(node_starts(counts_T1), depth_T1, 0).cummax(0).values
    parent_T1 = values_T1[(first_T1 - 1).clamp(min=0)]
    return (2 * values_T1 - values_T1[0] - parent_T1)[1:]


@register("advantage", "tree_rl", TreeRLConfig)
def tree_rl(groups: Sequence[Group], config: TreeRLConfig, context: Context) -> Advantages:
    """:func:`tree_rl_advantages` of every group; ``tree/leaves_per_token`` as in TreePO's."""
    values = [
        tree_rl_advantages(
            group.completion_ids,
            as_rewards(group.rewards_G),
            divide_by_leaves=config.divide_by_leaves,
            written=[written_mask(completion) for completion in group.completions],
        )
        for group in groups
    ]
    return Advantages(values=values, metrics={"tree/leaves_per_token": leaves_per_token(groups)})
