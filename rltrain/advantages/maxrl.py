"""MaxRL: the group advantage divided by the group's mean reward (arXiv 2602.02710)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.group import as_rewards, group_advantages, per_token
from rltrain.config import AdvantageConfig
from rltrain.errors import RunError
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group


@dataclass(kw_only=True)
class MaxRLConfig(AdvantageConfig):
    """See :func:`maxrl_advantages`."""


def maxrl_advantages(rewards: Sequence[float | None] | Tensor) -> Tensor:
    r"""``A_i = (r_i - mean(r)) / mean(r)``, 0 where the mean is 0. float64, shape [G].

    Of K right answers (reward 1) among G, a right one gets ``G/K - 1`` and a wrong one -1. The expected estimate is the
    gradient of ``-sum_{k=1}^{G-1} (1 - p)^k / k``, the first terms of log p, where p is the probability of a right
    answer.

    NaN or None rewards abstain: they leave the mean and get 0. All rewards equal gives exact zeros. ``ValueError`` for
    a negative reward, of which the mean is no probability.
    """
    rewards_G = as_rewards(rewards)
    valid = rewards_G[~rewards_G.isnan()]
    if bool((valid < 0).any()):
        raise ValueError(f"the reward {float(valid.min()):g} is negative, and MaxRL divides by the mean reward")
    centred_G = group_advantages(rewards_G, scale="none")
    return centred_G / valid.mean() if bool(centred_G.any()) else torch.zeros_like(centred_G)


@register("advantage", "maxrl", MaxRLConfig)
def maxrl(groups: Sequence[Group], config: MaxRLConfig, context: Context) -> Advantages:
    """:func:`maxrl_advantages` on every token of a completion; ``RunError`` for a negative reward."""
    return Advantages(values=[per_token(_of(group), group.completion_ids) for group in groups])


def _of(group: Group) -> Tensor:
    try:
        return maxrl_advantages(as_rewards(group.rewards_G))
    except ValueError as error:
        raise RunError(
            f"advantage=maxrl: problem {group.prompt.problem.id}: {error}; choose rewards that are 0 or more"
        ) from error
