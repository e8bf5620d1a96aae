"""TreePO: a leaf against every subgroup of the tree that it belongs to (arXiv 2508.17445)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.group import as_rewards, per_token
from rltrain.advantages.prefix_tree import (
    TokenIds,
    common_prefixes,
    leaf_counts,
    leaves_per_token,
    node_starts,
    node_values,
)
from rltrain.advantages.whitening import whiten_where
from rltrain.advantages.written import counted_tokens, written_mask
from rltrain.batching.zero_variance import is_zero_variance
from rltrain.config import AdvantageConfig
from rltrain.errors import require, require_one_of
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group

DEPTHS = ("nodes", "tokens")


@dataclass(kw_only=True)
class TreePOConfig(AdvantageConfig):
    """See :func:`tree_po_advantages` and :func:`tree_po`."""

    depths: str = "nodes"  # count a subgroup once (nodes), or once per token that it shares (tokens)
    whiten: bool = True  # over the tokens of the global batch
    eps: float = 1e-8  # added to the std

    def __post_init__(self) -> None:
        require_one_of(DEPTHS, "advantage.depths", self.depths)
        require(self.eps > 0, f"advantage.eps={self.eps}: must be > 0, a batch of equal advantages has std 0")


def tree_po_advantages(
    completion_ids: Sequence[TokenIds],
    rewards: Sequence[float | None] | Tensor,
    *,
    depths: str = "nodes",
    written: Sequence[Tensor] | None = None,
) -> Tensor:
    r"""``A_i = mean over the depths d of i with n > 1 leaves of (r_i - V_d)``, float64, shape [G].

    V_d is the mean reward of the n completions that share the first d tokens of i. The root is depth 0. With
    ``depths="nodes"`` a subgroup counts once, however many tokens it shares: the depths at which the set of sharers
    changes. ``"tokens"`` counts it once per token, of the ``written`` ones where these masks [T] are given. Without
    shared tokens A is r_i - mean(r).

    NaN or None rewards abstain: they are no leaves and get 0. Fewer than two rewards that count, or all equal, give
    exact zeros.
    """
    require_one_of(DEPTHS, "depths", depths)
    rewards_G = as_rewards(rewards)
    advantages_G = torch.zeros_like(rewards_G)
    if is_zero_variance(rewards_G):
        return advantages_G
    common_GG, counted_G = common_prefixes(completion_ids), ~rewards_G.isnan()
    values, counts = node_values(common_GG, rewards_G), leaf_counts(common_GG, counted_G)
    for i in counted_G.nonzero().flatten().tolist():
        taken_T1 = counts[i] > 1
        if depths == "nodes":
            taken_T1 &= node_starts(counts[i])
        elif written is not None:
            taken_T1[1:] &= written[i]
        advantages_G[i] = (rewards_G[i] - values[i][taken_T1]).mean()
    return advantages_G


@register("advantage", "tree_po", TreePOConfig)
def tree_po(groups: Sequence[Group], config: TreePOConfig, context: Context) -> Advantages:
    """:func:`tree_po_advantages` on every token of a completion, whitened over the tokens of the global batch.

    Population std (ddof 0) plus ``eps``, over all ranks. Zero-variance groups and abstaining completions are in no
    statistic and get exact zeros. ``whiten=False`` returns A. ``tree/leaves_per_token`` is the mean of n(s_{t+1}) over
    completion tokens: 1 without shared tokens. Statistics over tokens are over written ones.
    """
    rewards = [as_rewards(group.rewards_G) for group in groups]
    values = [
        per_token(_of_group(group, rewards_G, config.depths), group.completion_ids)
        for group, rewards_G in zip(groups, rewards, strict=True)
    ]
    if config.whiten:
        kept = [[not (is_zero_variance(row_G) or reward.isnan()) for reward in row_G] for row_G in rewards]
        values = whiten_where(values, counted_tokens(groups, kept), eps=config.eps, name="TreePO's advantages")
    shared = leaves_per_token(groups)
    return Advantages(values=values, metrics={"tree/leaves_per_token": shared})


def _of_group(group: Group, rewards_G: Tensor, depths: str) -> Tensor:
    written = [written_mask(completion) for completion in group.completions]
    return tree_po_advantages(group.completion_ids, rewards_G, depths=depths, written=written)
