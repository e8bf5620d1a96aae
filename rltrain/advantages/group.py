"""Group baselines: one advantage per completion, the same on each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.batching.zero_variance import is_zero_variance
from rltrain.config import AdvantageConfig
from rltrain.errors import require
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group


@dataclass(kw_only=True)
class GroupConfig(AdvantageConfig):
    """See :func:`group_advantages`."""

    baseline: str = "mean"  # subtracted from the reward: mean of the group, or leave_one_out
    scale: str = "std"  # std divides by the group's std + eps, none does not
    eps: float = 1e-6  # added to the std

    def __post_init__(self) -> None:
        _check(self.baseline, self.scale, self.eps)


def _check(baseline: str, scale: str, eps: float) -> None:
    require(baseline in ("mean", "leave_one_out"), f"advantage.baseline={baseline}: unknown; set mean or leave_one_out")
    require(scale in ("std", "none"), f"advantage.scale={scale}: unknown; set std or none")
    require(eps >= 0, f"advantage.eps={eps}: must be >= 0")


def as_rewards(rewards: Sequence[float | None] | Tensor | None) -> Tensor:
    """Rewards as float64 on the CPU, shape [G], with NaN for None. None in place of the whole group is a ValueError."""
    if rewards is None:
        raise ValueError("the group has no rewards; score it before asking for advantages")
    if isinstance(rewards, Tensor):
        return rewards.detach().to("cpu", torch.float64)
    return torch.tensor([torch.nan if reward is None else float(reward) for reward in rewards], dtype=torch.float64)


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
    """Spread :func:`group_advantages` over the tokens of each completion."""
    return Advantages(
        values=[
            per_token(
                group_advantages(
                    as_rewards(group.rewards_G), baseline=config.baseline, scale=config.scale, eps=config.eps
                ),
                group.completion_ids,
            )
            for group in groups
        ]
    )
