"""A reward from outside the package: ``reward=custom reward.import_path=my_package.my_module:function``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rltrain.config import MISSING, ConfigError, RewardConfig, register, require
from rltrain.types import Context, Group, Scores


@dataclass(kw_only=True)
class UserRewardConfig(RewardConfig):
    """Base of rewards that run a user's function: the whole batch must be scored within ``deadline_s`` seconds.

    It is imported when the config is made, so a wrong path is refused before a model is loaded.
    """

    import_path: str = MISSING
    deadline_s: float = 120.0

    def __post_init__(self) -> None:
        require(self.deadline_s > 0, f"reward.deadline_s={self.deadline_s}: must be > 0 seconds")
        if self.import_path != MISSING:
            load_function(self.import_path)


def load_function(import_path: str) -> Callable[..., Any]:
    """The callable that ``module:attribute`` names; ``ConfigError`` where module or attribute are missing."""
    key = f"reward.import_path={import_path}"
    module_name, _, attribute = import_path.partition(":")
    well_formed = bool(module_name and attribute and not module_name.startswith("."))
    require(well_formed, f"{key}: not of the form my_package.my_module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A package that the module itself imports is its own affair; only the path that was asked for is explained.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"{key}: no module named {error.name}; install it or add its folder to PYTHONPATH") from None
    function = getattr(module, attribute, None)
    require(callable(function), f"{key}: {module_name} has no function {attribute}; name one of its functions")
    assert callable(function)
    return function


@dataclass(kw_only=True)
class CustomConfig(UserRewardConfig):
    """``import_path`` names ``f(groups, options, context)``, giving ``Scores`` or nested lists (None abstains)."""

    options: dict[str, Any] = field(default_factory=dict)


@register("reward", "custom", CustomConfig)
def custom(groups: Sequence[Group], config: CustomConfig, context: Context) -> Scores:
    """Call the user's function."""
    result = load_function(config.import_path)(groups, config.options, context)
    return result if isinstance(result, Scores) else Scores(scores=result)
