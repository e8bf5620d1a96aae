"""The core structured configs, their rules, and the registry of parts. Imports no torch.

A part (estimator, reward, data set, rollout engine, model source) is one file holding its config dataclass and its
function under ``@register(group, name, Config)``; importing the file makes ``group=name`` a choice.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rltrain.types import Need

F = TypeVar("F", bound=Callable[..., Any])

MISSING: Any = "???"
PART_PACKAGES = ("rltrain.advantages", "rltrain.rewards", "rltrain.data", "rltrain.rollout", "rltrain.model")


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the key, the cause and the remedy in one line."""


def require(condition: bool, message: str) -> None:
    """Raise ``ConfigError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class Part:
    """A registered choice: ``function`` is called with an instance of ``config``."""

    group: str
    name: str
    config: type
    function: Callable[..., Any]
    needs: frozenset[Need]


_PARTS: dict[tuple[str, str], Part] = {}


def register(group: str, name: str, config: type, *, needs: Iterable[Need] = ()) -> Callable[[F], F]:
    """Make the decorated function (or class) the choice ``group=name``, configured by ``config``."""

    def add(function: F) -> F:
        known = _PARTS.get((group, name))
        if known and known.config.__qualname__ != config.__qualname__:
            raise ValueError(f"{group}={name} is registered twice ({known.config} and {config}); choose another name")
        _PARTS[group, name] = Part(group, name, config, function, frozenset(needs))
        return function

    return add


def parts(group: str | None = None) -> list[Part]:
    """All registered parts (of one group), sorted by name."""
    return [part for (part_group, _), part in sorted(_PARTS.items()) if group in (None, part_group)]


def part_of(config: Any) -> Part:
    """The part that a config instance belongs to."""
    for part in _PARTS.values():
        if type(config) is part.config:
            return part
    raise ConfigError(f"{type(config).__name__}: no registered part has this config; import the file that registers it")


def discover() -> None:
    """Import every in-tree plug-in file, so that its parts are registered."""
    for package_name in PART_PACKAGES:
        package = importlib.import_module(package_name)
        for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
            importlib.import_module(f"{package_name}.{module.name}")


@dataclass(kw_only=True)
class AdvantageConfig:
    """Base of every estimator's config; the function is ``f(groups, config, context) -> Advantages``."""


@dataclass(kw_only=True)
class RewardConfig:
    """Base of every reward's config; the function is ``f(groups, config, context) -> Scores``."""

    weight: float = 1.0


@dataclass(kw_only=True)
class DataConfig:
    """Base of every data set's config; the function is ``f(config, split) -> Sequence[Problem]``."""


@dataclass(kw_only=True)
class RolloutConfig:
    """Base of every rollout engine's config; the class is built as ``Engine(config, sampling, policy, seed)``."""


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters through peft; the base weights stay frozen."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])


@dataclass(kw_only=True)
class ModelConfig:
    """Base of every model source's config; the function is ``f(config) -> (model, tokenizer)``."""

    dtype: str = "float32"
    chat: bool = False
    system: str | None = None
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        require(
            self.dtype in ("float32", "bfloat16"),
            f"model.dtype={self.dtype}: not supported; set float32 or bfloat16",
        )


@dataclass(kw_only=True)
class SamplingConfig:
    """The distribution that completions are drawn from. ``top_k=0`` and ``top_p=1`` leave it whole."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    max_prompt_tokens: int = 1024
    stop: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(self.temperature >= 0, f"sampling.temperature={self.temperature}: must be >= 0 (0 is greedy)")
        require(0 < self.top_p <= 1, f"sampling.top_p={self.top_p}: must lie in (0, 1]; 1 keeps every token")
        require(self.top_k >= 0, f"sampling.top_k={self.top_k}: must be >= 0; 0 keeps every token")
        require(self.max_new_tokens >= 1, f"sampling.max_new_tokens={self.max_new_tokens}: set at least 1")
