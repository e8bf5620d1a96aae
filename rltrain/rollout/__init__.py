"""Rollout engines: what the trainer asks of one. Each engine is one file of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rltrain.config import SamplingConfig
from rltrain.types import Group, Prompt


class Rollout(Protocol):
    """Samples completions from the current policy; a pure function of (weights, seed, step, prompts)."""

    def generate(
        self, prompts: Sequence[Prompt], *, step: int, group_size: int, sampling: SamplingConfig | None = None
    ) -> list[Group]:
        """One group per prompt in the same order, without rewards; ``sampling`` replaces the run's for this call."""
        ...

    def sync(self, policy: Any) -> None:
        """Take over the policy's weights after an optimiser step."""
        ...
