"""A reward from outside the package: ``reward=custom reward.import_path=my_package.my_module:function``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from rltrain.config import MISSING, RewardConfig
from rltrain.errors import require
from rltrain.registry import check_arguments, declared_needs, load_callable, register
from rltrain.types import Context, Group, Need, Scores

KEY = "reward.import_path"


def is_list_of_scores(values: Any) -> bool:
    """Whether ``values`` can hold scores in order. The keys of a dict and the characters of a text are no scores."""
    return isinstance(values, Collection) and not isinstance(values, str | bytes | bytearray | Mapping | AbstractSet)


@dataclass(kw_only=True)
class UserRewardConfig(RewardConfig):
    """Base of rewards that call a user's function, which must score a batch within ``deadline_s`` seconds.

    The function is imported when the config is made, so that a wrong path is refused before a model is loaded.
    ``needs`` names the services that it uses, such as ``[scorer]``; so does its attribute ``needs = {Need.SCORER}``.
    """

    import_path: str = MISSING  # your function, as package.module:function
    deadline_s: float = 120.0
    needs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(self.deadline_s > 0, f"reward.deadline_s={self.deadline_s}: must be > 0 seconds")
        if self.import_path != MISSING:
            self.check(self.load())
            self.user_needs()

    def load(self) -> Callable[..., Any]:
        """The function; ``ConfigError`` where there is none."""
        return load_callable(self.import_path, key=KEY)

    def check(self, function: Callable[..., Any]) -> None:
        """``ConfigError`` for a function that cannot be called as this kind of reward is."""

    def user_needs(self) -> frozenset[Need]:
        return declared_needs(self.load(), self.needs, setting="reward")

    def longest_wait_s(self) -> float:
        return self.deadline_s


@dataclass(kw_only=True)
class CustomRewardConfig(UserRewardConfig):
    """``import_path`` names ``f(groups, options, context)``, giving ``Scores`` or nested lists (None abstains)."""

    options: dict[str, Any] = field(default_factory=dict)  # what your function gets as its second argument

    def check(self, function: Callable[..., Any]) -> None:
        """Three arguments."""
        check_arguments(function, ("groups", "options", "context"), setting=f"{KEY}={self.import_path}")


@register("reward", "custom", CustomRewardConfig)
def custom(groups: Sequence[Group], config: CustomRewardConfig, context: Context) -> Scores:
    """Call the user's function."""
    result = config.load()(groups, config.options, context)
    return result if isinstance(result, Scores) else Scores(scores=result)
