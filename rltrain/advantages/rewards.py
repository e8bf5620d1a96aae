"""A group's rewards as estimators compute with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_rewards(rewards: Sequence[float | None] | Tensor | None) -> Tensor:
    """Rewards as float64 on the CPU, shape [G], with NaN for None. None in place of the whole group is a ValueError."""
    if rewards is None:
        raise ValueError("the group has no rewards; score it before asking for advantages")
    if isinstance(rewards, Tensor):
        return rewards.detach().to("cpu", torch.float64)
    return torch.tensor([torch.nan if reward is None else float(reward) for reward in rewards], dtype=torch.float64)
