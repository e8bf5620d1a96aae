"""An estimator from a module outside this package, named by its import path."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rltrain.config import MISSING, AdvantageConfig, ConfigError, register, require
from rltrain.types import Advantages, Context, Group

Estimator = Callable[[Sequence[Group], dict[str, Any], Context], Advantages]


@dataclass(kw_only=True)
class CustomConfig(AdvantageConfig):
    """``import_path=my_package.my_module:estimator``, a function ``f(groups, options, context) -> Advantages``.

    It is imported when the config is made, so a wrong path is refused before a model is loaded.
    """

    import_path: str = MISSING
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.import_path != MISSING:
            load_estimator(self.import_path)


def load_estimator(import_path: str) -> Estimator:
    """The callable that ``module:attribute`` names; ``ConfigError`` where module or attribute are missing."""
    key = f"advantage.import_path={import_path}"
    module_name, _, attribute = import_path.partition(":")
    well_formed = bool(module_name and attribute and not module_name.startswith("."))
    require(well_formed, f"{key}: not of the form my_package.my_module:estimator")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A package that the module itself imports is its own affair; only the path that was asked for is explained.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"{key}: no module named {error.name}; install it or add its folder to PYTHONPATH") from None
    require(hasattr(module, attribute), f"{key}: {module_name} has no {attribute}; name one of its functions")
    estimator = getattr(module, attribute)
    require(callable(estimator), f"{key}: {attribute} is {type(estimator).__name__}, not callable; name a function")
    return estimator


def _check_lengths(result: Advantages, groups: Sequence[Group], import_path: str) -> None:
    expected = [[len(ids) for ids in group.completion_ids] for group in groups]
    returned = [[len(values_T) for values_T in group] for group in result.values]
    if returned != expected:
        raise ValueError(
            f"advantage.import_path={import_path}: returned values of lengths {returned}, expected {expected}; "
            "give one value per completion token"
        )


@register("advantage", "custom", CustomConfig)
def custom(groups: Sequence[Group], config: CustomConfig, context: Context) -> Advantages:
    """Call the estimator that ``config.import_path`` names and check that it gives one value per token."""
    result = load_estimator(config.import_path)(groups, config.options, context)
    _check_lengths(result, groups, config.import_path)
    return result
