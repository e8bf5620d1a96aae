"""Rollout engines: what the trainer asks of one. Each engine is one file of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

from rltrain.config import RolloutConfig, SamplingConfig
from rltrain.errors import require
from rltrain.registry import part_of
from rltrain.rollout.continuation_types import Continuing
from rltrain.runtime.interrupts import RolloutLost as RolloutLost
from rltrain.types import Group, Prober, Prompt


@runtime_checkable
class Rollout(Prober, Continuing, Protocol):
    """Samples completions from the current policy; a pure function of (weights, seed, step, prompts)."""

    @property
    def same_distribution(self) -> bool:
        """Whether the sampled log-probs are the trainer's own, so that it need not compute them again."""
        ...

    @property
    def uses_policy(self) -> bool:
        """Whether it samples with the policy's own module, whose weights must then be whole."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], *, step: int, group_size: int, sampling: SamplingConfig | None = None
    ) -> list[Group]:
        """One group per prompt in the same order, without rewards; ``sampling`` replaces the run's for this call."""
        ...

    def sync(self, policy: Any) -> None:
        """Take over the policy's weights after an optimiser step."""
        ...


class RolloutEngine(Protocol):
    """A registered engine class; ``uses_policy`` is known before one is built."""

    uses_policy: bool

    def __call__(self, config: RolloutConfig, sampling: SamplingConfig, policy: Any, *, seed: int) -> Rollout:
        """The engine, ready to sample."""
        ...


def engine_of(config: RolloutConfig) -> RolloutEngine:
    """The engine class that a config belongs to."""
    part = part_of(config)
    _require_attributes(part.function, ("uses_policy", "generate", "sync", "probe", "continue_"), name=part.name)
    return cast(RolloutEngine, part.function)


def build_engine(config: RolloutConfig, sampling: SamplingConfig, policy: Any, *, seed: int) -> Rollout:
    """The engine, ready to sample. ``same_distribution`` may depend on the settings, so the instance is checked."""
    engine = engine_of(config)(config, sampling, policy, seed=seed)
    _require_attributes(engine, ("same_distribution",), name=part_of(config).name)
    return engine


def _require_attributes(engine: Any, names: Sequence[str], *, name: str) -> None:
    missing = [attribute for attribute in names if not hasattr(engine, attribute)]
    require(not missing, f"rollout={name}: its class has no {', '.join(missing)}; see rltrain.rollout.Rollout")
