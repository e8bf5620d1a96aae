"""VinePPO: the value of each reasoning step by continuations from its beginning (arXiv 2410.01679)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.continued_values import (
    ContinuedValuesConfig,
    estimate,
    finished,
    segment_tokens,
    segment_values,
    spread,
)
from rltrain.advantages.group import as_rewards
from rltrain.advantages.spae_steps import check_delimiter
from rltrain.advantages.written import written_masks
from rltrain.errors import require
from rltrain.registry import register
from rltrain.rollout.probe_types import vocabulary
from rltrain.types import Advantages, Completion, Context, Group, Need


@dataclass(kw_only=True)
class VinePPOConfig(ContinuedValuesConfig):
    """See :func:`vineppo_advantages`. A step ends at a token whose own text ends in ``delimiter``."""

    delimiter: str = "\n"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.delimiter), "advantage.delimiter is empty: every token would end a step; set for example '\\n'"
        )


def vineppo_advantages(
    rewards: Sequence[Sequence[float | None] | Tensor],
    values: Sequence[Sequence[Sequence[float] | Tensor]],
    step_tokens: Sequence[Sequence[Sequence[int] | Tensor]],
    *,
    whiten: bool = True,
    written: Sequence[Sequence[Tensor]] | None = None,
) -> list[list[Tensor]]:
    r"""One float64 tensor [T] per completion. The arguments are nested groups x completions (x steps).

        A = V_{k+1} - V_k on the tokens of step k, r - V_k on those of the last     (rho = r at the end, V(end) = 0)
        result = (A - mean_B(A)) / (std_B(A) + 1e-8)                population std (ddof 0), if ``whiten``

    ``values`` are V_0 .. V_{K-1}, the mean reward of continuations from before each step. NaN is not estimated and
    takes the next estimated value, never V(end). Before whitening one A per step sums to ``r - V_0``. mean_B and std_B
    run over all tokens of all ranks, which call this together. NaN or None rewards, and an unknown V_0, abstain: they
    leave the statistics and get 0, and so do tokens that the masks [T] ``written`` do not mark, where they are given.
    """
    rows = spread(rewards, values, step_tokens)
    every = [[torch.ones_like(row_T, dtype=torch.bool) for row_T in group] for group in rows]
    return finished(rows, written or every, whiten=whiten, name="VinePPO's advantages")


def step_borders(completion: Completion, texts: Sequence[str], delimiter: str) -> list[int]:
    """The places inside a completion behind a token whose text ends in ``delimiter``, and where a turn begins.

    What an environment wrote ends no step, and no step begins in it: every border has a written token behind it.
    """
    ids, borders = completion.token_ids, []
    for start, stop in completion.written_spans:
        own = [texts[token] if token < len(texts) else "" for token in ids[start : stop - 1]]
        borders += [start] if start else []
        borders += [start + t + 1 for t, text in enumerate(own) if text.endswith(delimiter)]
    return borders


@register("advantage", "vineppo", VinePPOConfig, needs={Need.CONTINUATIONS})
def vineppo(groups: Sequence[Group], config: VinePPOConfig, context: Context) -> Advantages:
    """:func:`vineppo_advantages` with values by continuations at the beginning of every step.

    A turn begins a step. So the last step of a turn is credited with what the reply to it changed.
    """
    check_delimiter(context.tokenizer, config.delimiter)
    texts = vocabulary(context.tokenizer)
    borders = [[step_borders(one, texts, config.delimiter) for one in group.completions] for group in groups]
    tokens = [
        [segment_tokens(len(ids), inner) for ids, inner in zip(group.completion_ids, rows, strict=True)]
        for group, rows in zip(groups, borders, strict=True)
    ]
    values = segment_values(groups, borders, config, context)
    rewards = [as_rewards(group.rewards_G) for group in groups]
    rows = vineppo_advantages(rewards, values, tokens, whiten=config.whiten, written=written_masks(groups))
    return estimate(rows, values, tokens, name="vineppo")
