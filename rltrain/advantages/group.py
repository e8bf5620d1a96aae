"""Group baselines: one advantage per completion, the same on each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.prefix_tree import prefix_scales
from rltrain.advantages.rewards import as_rewards as as_rewards
from rltrain.batching.zero_variance import is_zero_variance
from rltrain.config import AdvantageConfig
from rltrain.errors import require
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group


@dataclass(kw_only=True)
class GroupConfig(AdvantageConfig):
    """See :func:`group_advantages`, and for ``prefix_scale`` :func:`prefix_scales`."""

    baseline: str = "mean"  # subtracted from the reward: mean of the group, or leave_one_out
    scale: str = "std"  # std divides by the group's std + eps, none does not
    eps: float = 1e-6  # added to the std
    prefix_scale: bool = False  # times (2n - 1)/n, n completions sharing the prefix

    def __post_init__(self) -> None:
        _check(self.baseline, self.scale, self.eps)
        defined = self.baseline == "leave_one_out" or not self.prefix_scale
        remedy = "set advantage.baseline=leave_one_out"
        require(defined, f"advantage.prefix_scale=true with advantage.baseline={self.baseline}: undefined; {remedy}")


def _check(baseline: str, scale: str, eps: float) -> None:
    require(baseline in ("mean", "leave_one_out"), f"advantage.baseline={baseline}: unknown; set mean or leave_one_out")
    require(scale in ("std", "none"), f"advantage.scale={scale}: unknown; set std or none")
    require(eps >= 0, f"advantage.eps={eps}: must be >= 0")


def per_token(advantages_G: Tensor, completion_ids: Sequence[Sequence[int]]) -> list[Tensor]:
    """Each completion's advantage on each of its tokens."""
    return [value.expand(len(ids)) for value, ids in zip(advantages_G, completion_ids, strict=True)]


def group_advantages(
    rewards_G: Sequence[float | None] | Tensor, *, baseline: str = "mean", scale: str = "std", eps: float = 1e-6
) -> Tensor:
    r"""``A_i = (r_i - b_i) / (std(r) + eps)``, float64, shape [G].

    ``baseline="mean"``: b_i = mean(r) (GRPO, arXiv 2402.03300). ``"leave_one_out"``: b_i = mean of the others, that
    is G/(G-1)·(r_i - mean(r)) (RLOO, arXiv 2402.14740). ``scale="std"`` divides by the sample standard deviation
    (ddof 1) plus eps. ``"none"`` does not (Dr.GRPO, arXiv 2503.20783).

    NaN or None rewards abstain: they leave the statistics and get advantage 0. Fewer than two rewards that count, or
    all equal, give exact zeros. An unknown ``baseline`` or ``scale`` is a ``ConfigError``.
    """
    _check(baseline, scale, eps)
    rewards = as_rewards(rewards_G)
    counted_G = ~rewards.isnan()
    valid = rewards[counted_G]
    advantages_G = torch.zeros_like(rewards)
    if is_zero_variance(rewards):
        return advantages_G
    centred = valid - valid.mean()
    if baseline == "leave_one_out":
        centred = centred * (len(valid) / (len(valid) - 1))
    advantages_G[counted_G] = centred / (valid.std(correction=1) + eps) if scale == "std" else centred
    return advantages_G


@register("advantage", "group", GroupConfig)
def group(groups: Sequence[Group], config: GroupConfig, context: Context) -> Advantages:
    """Spread :func:`group_advantages` over the tokens of each completion, with ``prefix_scale`` times a scale."""
    return Advantages(values=[_of_group(group, config) for group in groups])


def _of_group(group: Group, config: GroupConfig) -> list[Tensor]:
    rewards_G = as_rewards(group.rewards_G)
    advantages_G = group_advantages(rewards_G, baseline=config.baseline, scale=config.scale, eps=config.eps)
    rows = per_token(advantages_G, group.completion_ids)
    if not config.prefix_scale:
        return rows
    scales = prefix_scales(group.completion_ids, rewards_G)
    return [row_T * scale_T for row_T, scale_T in zip(rows, scales, strict=True)]
