"""An estimator from a module outside this package, named by its import path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rltrain.config import MISSING, AdvantageConfig
from rltrain.registry import load_callable, register
from rltrain.types import Advantages, Context, Group


@dataclass(kw_only=True)
class CustomAdvantageConfig(AdvantageConfig):
    """``import_path=my_package.my_module:estimator``, a function ``f(groups, options, context) -> Advantages``.

    It is imported when the config is made, so a wrong path is refused before a model is loaded.
    """

    import_path: str = MISSING
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.import_path != MISSING:
            load_callable(self.import_path, key="advantage.import_path")


def _check_lengths(result: Advantages, groups: Sequence[Group], import_path: str) -> None:
    expected = [[len(ids) for ids in group.completion_ids] for group in groups]
    returned = [[len(values_T) for values_T in group] for group in result.values]
    if returned != expected:
        raise ValueError(
            f"advantage.import_path={import_path}: returned values of lengths {returned}, expected {expected}; "
            "give one value per completion token"
        )


@register("advantage", "custom", CustomAdvantageConfig)
def custom(groups: Sequence[Group], config: CustomAdvantageConfig, context: Context) -> Advantages:
    """Call the estimator that ``config.import_path`` names and check that it gives one value per token."""
    result = load_callable(config.import_path, key="advantage.import_path")(groups, config.options, context)
    _check_lengths(result, groups, config.import_path)
    return result
