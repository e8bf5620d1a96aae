"""An estimator from a module outside this package, named by its import path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rltrain.config import MISSING, AdvantageConfig
from rltrain.registry import check_arguments, declared_needs, load_callable, register
from rltrain.types import Advantages, Context, Group, Need

KEY = "advantage.import_path"


@dataclass(kw_only=True)
class UserEstimatorConfig(AdvantageConfig):
    """Base of estimators that run a user's function, named by ``import_path``.

    It is imported when the config is made, so that a wrong path is refused before a model is loaded. ``needs`` names
    the services that it uses, such as ``[scorer]``; so does its attribute ``needs = {Need.SCORER}``.
    """

    import_path: str = MISSING
    options: dict[str, Any] = field(default_factory=dict)  # what your function gets as its second argument
    needs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.import_path != MISSING:
            self.check(self.load())
            self.user_needs()

    def load(self) -> Callable[..., Any]:
        """The function; ``ConfigError`` where there is none."""
        return load_callable(self.import_path, key=KEY)

    def user_needs(self) -> frozenset[Need]:
        return declared_needs(self.load(), self.needs, setting="advantage")

    def check(self, function: Callable[..., Any]) -> None:
        """``ConfigError`` for a function that cannot be called as this kind of estimator is."""
        raise NotImplementedError


@dataclass(kw_only=True)
class CustomAdvantageConfig(UserEstimatorConfig):
    """``import_path=my_package.my_module:estimator``, a function ``f(groups, options, context) -> Advantages``."""

    def check(self, function: Callable[..., Any]) -> None:
        """Three arguments."""
        check_arguments(function, ("groups", "options", "context"), setting=f"{KEY}={self.import_path}")


@register("advantage", "custom", CustomAdvantageConfig)
def custom(groups: Sequence[Group], config: CustomAdvantageConfig, context: Context) -> Advantages:
    """Call the estimator that ``config.import_path`` names."""
    return config.load()(groups, config.options, context)
