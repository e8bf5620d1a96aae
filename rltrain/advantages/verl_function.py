"""Advantage functions written for verl: ``f(token_level_rewards, response_mask, index) -> (advantages, returns)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rltrain.advantages.check import EstimatorError
from rltrain.advantages.custom import KEY, UserEstimatorConfig
from rltrain.advantages.group import as_rewards
from rltrain.advantages.written import written_mask
from rltrain.errors import require
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group


@dataclass(kw_only=True)
class VerlFunctionConfig(UserEstimatorConfig):
    """``import_path=my_package.my_module:estimator``, with the signature that verl asks for.

    ``options`` are more keyword arguments (``norm_adv_by_std_in_grpo: false``). A ``config`` argument without a default
    gets them as a dictionary.
    """

    def check(self, function: Callable[..., Any]) -> None:
        """All that it takes can be given."""
        self.arguments(function)

    def arguments(self, function: Callable[..., Any]) -> dict[str, Any]:
        """``options`` as keyword arguments of ``function``. ConfigError for an argument that is missing or unknown."""
        parameters = inspect.signature(function).parameters
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        given = {name: value for name, value in self.options.items() if open_ended or name in parameters}
        unknown = set(self.options) - set(given)
        if "config" in parameters and "config" not in given and parameters["config"].default is inspect.Parameter.empty:
            given["config"] = dict(self.options)
            unknown = set()
        require(not unknown, f"advantage.options={sorted(unknown)}: {self.import_path} takes no such argument")
        needed = {
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
        missing = needed - set(given) - {"token_level_rewards", "response_mask", "index"}
        require(
            not missing,
            f"{KEY}={self.import_path}: needs {sorted(missing)}, which only verl's trainer has;"
            " give it in advantage.options or write the estimator for advantage=custom",
        )
        return given


@dataclass(frozen=True, kw_only=True)
class VerlBatch:
    """B completions as verl pads them: right-padded, rewards on the last written token, one index per prompt.

    The response mask is 0 at padding and at ids that an environment wrote.
    """

    token_level_rewards_BT: Tensor
    response_mask_BT: Tensor
    index_B: Any  # an object array of NumPy, as verl has it


def verl_batch(groups: Sequence[Group]) -> tuple[VerlBatch, list[tuple[int, int]]]:
    """The completions that do not abstain and have a written token, and for each its (group, sample)."""
    import numpy as np

    rewards = [as_rewards(group.rewards_G) for group in groups]
    places = [
        (g, i)
        for g, group in enumerate(groups)
        for i, completion in enumerate(group.completions)
        if completion.written_tokens and not rewards[g][i].isnan()
    ]
    width = max((len(groups[g].completion_ids[i]) for g, i in places), default=0)
    mask_BT = torch.zeros(len(places), width)
    rewards_BT = torch.zeros(len(places), width)
    for row, (g, i) in enumerate(places):
        written_T = written_mask(groups[g].completions[i])
        mask_BT[row, : len(written_T)] = written_T.float()
        rewards_BT[row, int(written_T.nonzero()[-1])] = rewards[g][i]
    batch = VerlBatch(
        token_level_rewards_BT=rewards_BT,
        response_mask_BT=mask_BT,
        index_B=np.array([f"{g}/{groups[g].prompt.problem.id}" for g, _ in places], dtype=object),
    )
    return batch, places


@register("advantage", "verl_function", VerlFunctionConfig)
def verl_function(groups: Sequence[Group], config: VerlFunctionConfig, context: Context) -> Advantages:
    """The function's advantages on each completion's own tokens. A completion that abstains gets 0.

    It sees the groups of this rank, in fp32, as one right-padded batch. ``index`` is the same for the completions of
    one prompt. An answer of another form or shape is an ``EstimatorError``.
    """
    function = config.load()
    values = [[torch.zeros(len(ids)) for ids in group.completion_ids] for group in groups]
    batch, places = verl_batch(groups)
    if not places:
        return Advantages(values=values)
    returned = function(
        token_level_rewards=batch.token_level_rewards_BT,
        response_mask=batch.response_mask_BT,
        index=batch.index_B,
        **config.arguments(function),
    )
    advantages_BT = _advantages_of(returned, tuple(batch.response_mask_BT.shape), f"{KEY}={config.import_path}")
    for row, (g, i) in enumerate(places):
        values[g][i] = advantages_BT[row, : len(values[g][i])].detach()
    return Advantages(values=values)


def _advantages_of(returned: Any, shape: tuple[int, ...], name: str) -> Tensor:
    """The first of verl's pair, if it is a tensor of the padded batch's shape."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise EstimatorError(f"{name}: returned {type(returned).__name__}, expected verl's pair (advantages, returns)")
    advantages_BT = returned[0]
    if not isinstance(advantages_BT, Tensor) or tuple(advantages_BT.shape) != shape:
        shown = tuple(advantages_BT.shape) if isinstance(advantages_BT, Tensor) else type(advantages_BT).__name__
        raise EstimatorError(
            f"{name}: returned advantages of shape {shown}, expected {shape}; give one value per token of the padded "
            "batch"
        )
    return advantages_BT
