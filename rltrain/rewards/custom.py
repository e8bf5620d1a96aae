"""A reward from outside the package: ``reward=custom reward.import_path=my_package.my_module:function``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rltrain.config import MISSING, ConfigError, RewardConfig, register, require
from rltrain.types import Context, Group, Scores


def import_function(path: str, *, key: str) -> Callable[..., Any]:
    """The callable at ``module:attribute``; a ``ConfigError`` that names ``key`` otherwise."""
    module, colon, attribute = path.partition(":")
    require(bool(colon and attribute), f"{key}={path}: not of the form package.module:function")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}={path}: {error}; is its folder on PYTHONPATH?") from error
    require(callable(function), f"{key}={path}: not callable; name a function")
    return function


@dataclass(kw_only=True)
class CustomConfig(RewardConfig):
    """``import_path`` names ``f(groups, config, context)`` that returns ``Scores`` or nested lists; ``arguments`` is free."""

    import_path: str = MISSING
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.import_path != MISSING:
            import_function(self.import_path, key="reward.import_path")


@register("reward", "custom", CustomConfig)
def custom(groups: Sequence[Group], config: CustomConfig, context: Context) -> Scores:
    """Call the user's function."""
    result = import_function(config.import_path, key="reward.import_path")(groups, config, context)
    return result if isinstance(result, Scores) else Scores(scores=result)
