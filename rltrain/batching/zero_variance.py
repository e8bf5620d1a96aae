"""Zero-variance groups, whose rewards are all equal: nothing is learnt from them by most estimators, which give them
advantages of 0. Those that learn from them say so in their config (``learns_from_equal_rewards``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from rltrain.errors import RunError
from rltrain.runtime import dist
from rltrain.types import Group

log = logging.getLogger(__name__)


class ZeroVarianceError(RunError):
    """Too many steps in a row had zero-variance groups only."""


def is_zero_variance(rewards_G: Tensor) -> bool:
    """Whether the rewards that count (not NaN) are all equal, or fewer than two count."""
    valid = rewards_G[~rewards_G.isnan()]
    return not bool((valid != valid[:1]).any())


def is_zero_variance_group(group: Group) -> bool:
    """:func:`is_zero_variance` of a scored group."""
    assert group.rewards_G is not None
    return is_zero_variance(group.rewards_G)


def count(steps: int, groups: Sequence[Group]) -> int:
    """How many steps in a row, ``steps`` before this one, had zero-variance groups only, on all ranks."""
    differs_here = torch.tensor(float(not all(is_zero_variance_group(group) for group in groups)))
    return 0 if dist.all_max(differs_here, name="any group with unequal rewards") else steps + 1


def refuse(step: int, steps: int, *, limit: int) -> None:
    """Warn after ``steps`` steps in a row without a group to learn from. Raise at ``limit`` (0: never)."""
    if steps and dist.is_main():
        log.warning("step %d: every group has equal rewards, nothing is learnt (%d in a row)", step, steps)
    if steps >= limit > 0:
        raise ZeroVarianceError(
            f"{steps} steps in a row had equal rewards in every group (max_zero_signal_steps={limit}); check the "
            "reward, or choose problems of a fitting difficulty"
        )
