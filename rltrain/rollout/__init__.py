"""Rollout engines: what the trainer asks of one. Each engine is one file of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rltrain.config import SamplingConfig
from rltrain.errors import RunError
from rltrain.runtime.interrupts import EXIT_INTERRUPTED
from rltrain.types import Group, Prompt


class RolloutLost(RunError):
    """No engine is left to sample with; raised on every rank at once. The exit code tells a batch script to requeue."""

    exit_code = EXIT_INTERRUPTED


class Rollout(Protocol):
    """Samples completions from the current policy; a pure function of (weights, seed, step, prompts).

    ``same_distribution`` (True if missing): log-probs are the trainer's own, so it need not compute them again.
    ``uses_policy`` (True if missing): it samples with the policy's own module, whose weights must then be whole.
    """

    def generate(
        self, prompts: Sequence[Prompt], *, step: int, group_size: int, sampling: SamplingConfig | None = None
    ) -> list[Group]:
        """One group per prompt in the same order, without rewards; ``sampling`` replaces the run's for this call."""
        ...

    def sync(self, policy: Any) -> None:
        """Take over the policy's weights after an optimiser step."""
        ...
