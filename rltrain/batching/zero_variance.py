"""Groups and steps that can teach nothing, because all rewards of a group are equal."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from rltrain.errors import RunError
from rltrain.runtime import dist
from rltrain.types import Group

log = logging.getLogger(__name__)


class NoSignalError(RunError):
    """Too many steps in a row taught nothing."""


def has_signal(group: Group) -> bool:
    """Whether the rewards that count are not all equal."""
    assert group.rewards_G is not None
    valid = group.rewards_G[~group.rewards_G.isnan()]
    return len(valid) > 1 and bool((valid != valid[0]).any())


def count(steps: int, groups: Sequence[Group]) -> int:
    """How many steps in a row, ``steps`` before this one, had no group on any rank that could teach anything."""
    signal_here = torch.tensor(float(any(has_signal(group) for group in groups)))
    return 0 if dist.all_max(signal_here, name="any signal") else steps + 1


def refuse(step: int, steps: int, *, limit: int) -> None:
    """Warn of steps in a row that taught nothing, and at the limit (0: none) stop."""
    if steps and dist.is_main():
        log.warning("step %d: every group has equal rewards, nothing is learnt (%d in a row)", step, steps)
    if steps >= limit > 0:
        raise NoSignalError(
            f"{steps} steps in a row had equal rewards in every group (max_zero_signal_steps={limit}); check the "
            "reward, or choose problems of a fitting difficulty"
        )
