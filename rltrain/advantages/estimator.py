"""An estimator ready to be called, from whatever names it: a config, a registered name, or a plain function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass
from types import FunctionType
from typing import Any

from rltrain.advantages.check import (
    EstimatorError,
    check_advantages,
    check_unchanged,
    copied_rewards,
    without_observed,
)
from rltrain.advantages.custom import UserEstimatorConfig
from rltrain.config import AdvantageConfig
from rltrain.errors import ConfigError, require, require_one_of
from rltrain.registry import check_arguments, declared_needs, discover, needs_of, part_of, parts
from rltrain.types import Advantages, Context, Group, Need

# What names an estimator: a config, the name of a registered one, or ``f(groups, options, context) -> Advantages``.
EstimatorLike = AdvantageConfig | str | Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """``estimator(groups, context)`` gives what the function returns, checked, with 0 at ids that an environment wrote.

    ``name`` begins each error message.

    Its state in ``context`` has the key ``advantage/part``.
    """

    name: str
    part: str
    needs: frozenset[Need]
    function: Callable[[Sequence[Group], Context], Any]

    def __call__(self, groups: Sequence[Group], context: Context) -> Advantages:
        """``EstimatorError`` for a result that :func:`check_advantages` refuses, and for rewards changed in place."""
        before = copied_rewards(groups)
        try:
            advantages = self.function(groups, context.of_part(f"advantage/{self.part}", self.needs))
        except FrozenInstanceError as error:  # what group.rewards_G -= 1 raises, after it has changed the tensor
            raise EstimatorError(
                f"{self.name}: {error}, which is fixed; work on a copy such as group.rewards_G.clone()"
            ) from error
        check_unchanged(groups, before, self.name)
        check_advantages(groups, advantages, self.name)
        return without_observed(groups, advantages)


def estimator_of(advantage: EstimatorLike, options: Mapping[str, Any] | None = None) -> Estimator:
    """``options`` are the settings of a name, or what a function gets as its second argument; a config has its own.

    A ``ConfigError`` for a name or an option that does not exist, and for a function of other arguments.
    """
    if isinstance(advantage, str):
        return _of_config(_configured(advantage, options or {}))
    if isinstance(advantage, AdvantageConfig):
        require(not options, f"options={options}: {type(advantage).__name__} has its own; set them there")
        return _of_config(advantage)
    is_class = isinstance(advantage, type)
    if is_class or not callable(advantage):
        remedy = f"give {advantage.__name__}()" if is_class else "give a config, a registered name or a function"
        raise ConfigError(f"advantage={advantage!r}: neither a config nor a name nor a function; {remedy}")
    return _of_function(advantage, dict(options or {}))


def _configured(name: str, options: Mapping[str, Any]) -> AdvantageConfig:
    discover()
    known = {part.name: part.config for part in parts("advantage")}
    require_one_of(known, "advantage", name)
    fields = [field.name for field in dataclasses.fields(known[name])]
    unknown = sorted(set(options) - set(fields))
    require(not unknown, f"advantage={name}: has no option {', '.join(unknown)}; it has {', '.join(fields) or 'none'}")
    return known[name](**options)


def _of_config(config: AdvantageConfig) -> Estimator:
    part = part_of(config)
    from_outside = isinstance(config, UserEstimatorConfig)
    return Estimator(
        name=f"advantage.import_path={config.import_path}" if from_outside else f"advantage={part.name}",
        part=part.name,
        needs=needs_of(config),
        function=lambda groups, context: part.function(groups, config, context),
    )


def _of_function(function: Callable[..., Any], options: dict[str, Any]) -> Estimator:
    named = isinstance(function, FunctionType)
    name = f"advantage={function.__module__}:{function.__qualname__}" if named else f"advantage={function!r}"
    check_arguments(function, ("groups", "options", "context"), setting=name)
    needs = declared_needs(function, (), setting=name)
    return Estimator(
        name=name, part="function", needs=needs, function=lambda groups, context: function(groups, options, context)
    )
