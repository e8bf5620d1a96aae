"""Differences of the value that the policy's introspection head predicts (docs/introspection.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.continued_values import finished
from rltrain.advantages.rewards import as_rewards
from rltrain.advantages.written import among_zeros, written_masks, written_values
from rltrain.config import AdvantageConfig, RunConfig
from rltrain.errors import require
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group, Mean, Need


@dataclass(kw_only=True)
class IntrospectionAdvantageConfig(AdvantageConfig):
    """See :func:`value_differences`."""

    whiten: bool = False  # subtract the mean over tokens and divide by their std

    def learns_from_equal_rewards(self) -> bool:
        return True

    def check_run(self, run: RunConfig) -> None:
        require(
            run.model.introspection.head,
            "advantage=introspection: the policy has no introspection head; set model.introspection.head=true",
        )


def value_differences(values_T: Tensor, reward: float) -> Tensor:
    """``A_t = V(s_{t+1}) - V(s_t)``, float64 [T]; after the last token the value is the reward.

    ``values_T`` are V before each token. The sum over tokens is r - V(s_0).
    """
    values_T = values_T.double()
    return torch.cat([values_T[1:], values_T.new_tensor([reward])]) - values_T


@register("advantage", "introspection", IntrospectionAdvantageConfig, needs={Need.VALUES})
def introspection(groups: Sequence[Group], config: IntrospectionAdvantageConfig, context: Context) -> Advantages:
    """:func:`value_differences` over the written tokens, with V of the policy as it is before the step.

    A completion whose reward abstains gets 0. ``whiten`` subtracts the mean and divides by the population std plus
    1e-8, over all tokens of all ranks. ``introspection/value_error`` is the mean of (V - r)² over written tokens.
    """
    rows, errors = [], Mean(total=0, count=0)
    for group, predicted in zip(groups, context.values(groups), strict=True):
        rewards = as_rewards(group.rewards_G).tolist()
        row = []
        for completion, values_T, reward in zip(group.completions, predicted, rewards, strict=True):
            values_W = written_values(values_T.double(), completion)
            abstains = math.isnan(reward)
            differences_W = torch.full_like(values_W, math.nan) if abstains else value_differences(values_W, reward)
            row.append(among_zeros(differences_W, completion))
            errors += Mean(total=0, count=0) if abstains else Mean.of((values_W - reward).square())
        rows.append(row)
    values = finished(rows, written_masks(groups), whiten=config.whiten, name="introspection's advantages")
    return Advantages(values=values, metrics={"introspection/value_error": errors})
