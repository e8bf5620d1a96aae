"""A loss from a module outside this package, named by its import path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rltrain.errors import RunError
from rltrain.losses.config import LossConfig
from rltrain.losses.terms import LossTerms
from rltrain.registry import MISSING, check_arguments, load_callable, register
from rltrain.types import TokenBatch

KEY = "loss.import_path"


@dataclass(kw_only=True)
class CustomLossConfig(LossConfig):
    """``import_path=my_package.my_module:loss``, a function ``f(logprobs_N, batch, options) -> LossTerms``.

    It is imported when the config is made, so that a wrong path is refused before a model is loaded.
    ``separable_tokens`` says that a token's term depends on that token alone. Then the head may call the function with
    some of the tokens.
    """

    import_path: str = MISSING  # my_package.my_module:loss
    options: dict[str, Any] = field(default_factory=dict)  # what the function gets as its third argument
    separable_tokens: bool = False  # whether a token's term depends on that token alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.import_path != MISSING:
            check_arguments(self.load(), ("logprobs_N", "batch", "options"), setting=f"{KEY}={self.import_path}")

    def load(self) -> Callable[..., Any]:
        """The function; ``ConfigError`` where there is none."""
        return load_callable(self.import_path, key=KEY)

    def separable_surrogate(self) -> bool:
        return self.separable_tokens

    def keeps_zero_advantages(self) -> bool:
        """Nobody knows what the function does at an advantage of 0."""
        return True


@register("loss", "custom", CustomLossConfig)
def custom(logprobs_N: Tensor, batch: TokenBatch, config: CustomLossConfig) -> LossTerms:
    """Call the function that ``config.import_path`` names, and check what it gives."""
    terms = config.load()(logprobs_N, batch, config.options)
    where = f"{KEY}={config.import_path}"
    if not isinstance(terms, LossTerms):
        raise RunError(f"{where}: returned {type(terms).__name__}; return LossTerms(loss_N=…)")
    for name, values_N in {"loss_N": terms.loss_N, **terms.metrics_N}.items():
        if not isinstance(values_N, Tensor) or values_N.shape != logprobs_N.shape:
            given = tuple(values_N.shape) if isinstance(values_N, Tensor) else type(values_N).__name__
            raise RunError(f"{where}: {name} is {given}; give one value per loss token, {tuple(logprobs_N.shape)}")
    return terms
