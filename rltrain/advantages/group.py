"""Group baselines: one advantage per completion, the same on each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.config import AdvantageConfig, register, require
from rltrain.types import Advantages, Context, Group


@dataclass(kw_only=True)
class GroupConfig(AdvantageConfig):
    """See :func:`group_advantages`."""

    baseline: str = "mean"
    scale: str = "std"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        require(
            self.baseline in ("mean", "leave_one_out"),
            f"advantage.baseline={self.baseline}: unknown; set mean or leave_one_out",
        )
        require(self.scale in ("std", "none"), f"advantage.scale={self.scale}: unknown; set std or none")
        require(self.eps >= 0, f"advantage.eps={self.eps}: must be >= 0")


def group_advantages(
    rewards_G: Sequence[float] | Tensor, *, baseline: str = "mean", scale: str = "std", eps: float = 1e-6
) -> Tensor:
    r"""``A_i = (r_i - b_i) / (std(r) + eps)``, float64, shape [G].

    ``baseline="mean"``: b_i = mean(r) (GRPO, arXiv 2402.03300). ``"leave_one_out"``: b_i = mean of the others, that
    is G/(G-1)·(r_i - mean(r)) (RLOO, arXiv 2402.14740). ``scale="std"`` divides by the sample standard deviation
    (ddof 1) plus eps; ``"none"`` does not (Dr.GRPO, arXiv 2503.20783).

    NaN rewards abstain: they leave the statistics and get advantage 0. Fewer than two rewards that count, or all
    equal, give exact zeros.
    """
    rewards_G = torch.as_tensor(rewards_G, dtype=torch.float64)
    counted_G = ~rewards_G.isnan()
    valid = rewards_G[counted_G]
    advantages_G = torch.zeros_like(rewards_G)
    if len(valid) < 2 or bool((valid == valid[0]).all()):
        return advantages_G
    centred = valid - valid.mean()
    if baseline == "leave_one_out":
        centred = centred * (len(valid) / (len(valid) - 1))
    advantages_G[counted_G] = centred / (valid.std(correction=1) + eps) if scale == "std" else centred
    return advantages_G


@register("advantage", "group", GroupConfig)
def group(groups: Sequence[Group], config: GroupConfig, context: Context) -> Advantages:
    """Spread :func:`group_advantages` over the tokens of each completion."""
    values = []
    for one in groups:
        advantages_G = group_advantages(
            one.rewards_G, baseline=config.baseline, scale=config.scale, eps=config.eps
        )
        lengths = [len(completion.token_ids) for completion in one.completions]
        values.append([advantage.expand(length) for advantage, length in zip(advantages_G, lengths, strict=True)])
    return Advantages(values=values)
