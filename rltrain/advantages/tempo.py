"""TEMPO: credit at the tokens where a group's completions part, from the rewards alone (arXiv 2509.18314)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.group import as_rewards
from rltrain.advantages.prefix_tree import TokenIds, common_prefixes, node_values, prefix_values
from rltrain.advantages.written import written_mask
from rltrain.batching.zero_variance import is_zero_variance
from rltrain.config import AdvantageConfig
from rltrain.errors import require
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group, Mean


@dataclass(kw_only=True)
class TempoConfig(AdvantageConfig):
    """See :func:`tempo_advantages`."""

    eps: float = 1e-6  # added to the std
    normalize_std: bool = True  # divide by the group's std

    def __post_init__(self) -> None:
        require(self.eps >= 0, f"advantage.eps={self.eps}: must be >= 0")


def _combine(rewards_G: Tensor, values: Sequence[Tensor], *, eps: float, normalize_std: bool) -> list[Tensor]:
    if is_zero_variance(rewards_G):
        return [torch.zeros_like(values_T1[1:]) for values_T1 in values]
    valid = rewards_G[~rewards_G.isnan()]
    scale = valid.std(correction=1) + eps if normalize_std else torch.ones(())
    return [
        torch.zeros_like(values_T1[1:]) if centred.isnan() else values_T1.diff().add_(centred).div_(scale)
        for centred, values_T1 in zip(rewards_G - valid.mean(), values, strict=True)
    ]


def tempo_advantages(
    completion_ids: Sequence[TokenIds],
    rewards: Sequence[float | None] | Tensor,
    *,
    eps: float = 1e-6,
    normalize_std: bool = True,
) -> list[Tensor]:
    r"""``A_{i,t} = [r_i - mean(r) + V(s_{t+1}) - V(s_t)] / (std(r) + eps)``, float64, one tensor [T] per completion.

    V is :func:`~rltrain.advantages.prefix_tree.prefix_values`. The token credited is the one that leads into the child.
    Sample std (ddof 1), discount 1. ``normalize_std=False`` divides by 1. Where the group does not split, the
    difference is exactly 0 and A is the group advantage.

    NaN or None rewards abstain: they leave the trie and the statistics and get 0. Fewer than two rewards that count,
    or all equal, give exact zeros.
    """
    rewards_G = as_rewards(rewards)
    return _combine(rewards_G, prefix_values(completion_ids, rewards_G), eps=eps, normalize_std=normalize_std)


def _depths_alone(common_GG: Tensor) -> Tensor:
    """Tokens until no other completion shares the prefix, the whole length if another always does."""
    others_GG = common_GG.clone().fill_diagonal_(-1)
    return torch.minimum(others_GG.amax(1) + 1, common_GG.diagonal())


def _splits_late(common_GG: Tensor) -> bool:
    """Whether two completions share their first token and differ after it."""
    lengths_G = common_GG.diagonal()
    longer_GG = torch.maximum(lengths_G[:, None], lengths_G[None, :])
    return bool(((common_GG >= 1) & (common_GG < longer_GG)).any())


@register("advantage", "tempo", TempoConfig)
def tempo(groups: Sequence[Group], config: TempoConfig, context: Context) -> Advantages:
    """:func:`tempo_advantages` of every group, with three metrics of its distance from the group advantage.

    The metrics count written tokens.
    """
    advantages = []
    nonzero, alone, late = Mean(total=0, count=0), Mean(total=0, count=0), Mean(total=0, count=0)
    for group in groups:
        rewards_G, common_GG = as_rewards(group.rewards_G), common_prefixes(group.completion_ids)
        values = node_values(common_GG, rewards_G)
        advantages.append(_combine(rewards_G, values, eps=config.eps, normalize_std=config.normalize_std))
        counted = (~rewards_G.isnan()).nonzero().flatten()
        if len(counted):
            trie_GG = common_GG[counted][:, counted]
            written = [written_mask(group.completions[i]) for i in counted]
            moved = [(values[i].diff() != 0)[mask_T] for i, mask_T in zip(counted, written, strict=True)]
            nonzero += Mean.of(torch.cat(moved))
            depths = zip(written, _depths_alone(trie_GG).tolist(), strict=True)
            alone += Mean.of([int(mask_T[:depth].sum()) for mask_T, depth in depths])
            late += Mean.of(float(_splits_late(trie_GG)))
    metrics = {"tempo/nonzero_td_share": nonzero, "tempo/alone_depth_tokens": alone, "tempo/late_split_share": late}
    return Advantages(values=advantages, metrics=metrics)
