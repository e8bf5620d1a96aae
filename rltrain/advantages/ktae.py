"""KTAE: token ids that go with right answers get more than the group's advantage (arXiv 2505.16826)."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rltrain.advantages.group import as_rewards, group_advantages
from rltrain.advantages.key_tokens import token_weights
from rltrain.advantages.written import among_zeros
from rltrain.config import AdvantageConfig
from rltrain.errors import RunError, require
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group, Mean, is_right

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True)
class KTAEConfig(AdvantageConfig):
    """See :func:`ktae_advantages`. A reward above ``correct_above`` is a right answer."""

    correct_above: float = 0.5  # a reward above it is a right answer
    eps: float = 1e-6  # added to the group's std

    def __post_init__(self) -> None:
        require(self.eps >= 0, f"advantage.eps={self.eps}: must be >= 0")


def ktae_advantages(
    completion_ids: Sequence[Sequence[int]],
    rewards: Sequence[float | None] | Tensor,
    *,
    correct_above: float = 0.5,
    eps: float = 1e-6,
    ends: Collection[int] = (),
) -> list[Tensor]:
    r"""``A_{i,t} = A_i + 2·(sigmoid(w_v) - 0.5)`` for the token id v at t, float64, one tensor [T] per completion.

    A_i is GRPO's advantage (sample std, ddof 1, plus ``eps``), w is that of
    :func:`~rltrain.advantages.key_tokens.token_weights`. NaN or None rewards abstain:
    those completions are in no count and get 0. All rewards equal gives exact zeros.
    """
    rewards_G = as_rewards(rewards)
    shared_G = group_advantages(rewards_G, eps=eps)
    counted = (~rewards_G.isnan()).nonzero().flatten().tolist()
    right = [bool(is_right(float(rewards_G[i]), above=correct_above)) for i in counted]
    vocabulary, weights = token_weights([completion_ids[i] for i in counted], right, ends=ends)
    vocabulary_V, added_V = torch.from_numpy(vocabulary), 2 * (torch.from_numpy(weights).sigmoid() - 0.5)
    rows = [torch.zeros(len(ids), dtype=torch.float64) for ids in completion_ids]
    for i in counted:
        places_T = torch.searchsorted(vocabulary_V, torch.tensor(completion_ids[i], dtype=torch.int64))
        rows[i] = shared_G[i] + added_V[places_T]
    return rows


def end_ids(groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that ended a completion that stopped, or a turn that was answered: special tokens at its end.

    A stop string ends a completion or turn with an ordinary token, which is none of them.
    """
    completions = [completion for group in groups for completion in group.completions]
    last = {one.token_ids[-1] for one in completions if one.finish == "stop" and one.token_ids}
    for one in completions:
        pairs = itertools.pairwise(zip(one.token_ids, one.written_T, strict=True)) if one.turns else ()
        last |= {token for (token, written), (_, goes_on) in pairs if written and not goes_on}
    return last & set(tokenizer.all_special_ids)


@register("advantage", "ktae", KTAEConfig)
def ktae(groups: Sequence[Group], config: KTAEConfig, context: Context) -> Advantages:
    """:func:`ktae_advantages` of every group. ``ktae/shift`` is the mean of what a token is moved by.

    Ids that an environment wrote are not counted.
    ``RunError`` without a tokenizer, which alone says whether a last token is EOS or that of a stop string.
    """
    if context.tokenizer is None:
        raise RunError(
            "advantage=ktae: the tokenizer is not at hand, and EOS cannot be told from the last token of a stop "
            "string; train with rltrain.train, or call ktae_advantages with ends=[EOS id]"
        )
    ends = end_ids(groups, context.tokenizer)
    values, shift = [], Mean(total=0, count=0)
    for group in groups:
        rewards_G = as_rewards(group.rewards_G)
        rows = ktae_advantages(
            [completion.written_ids for completion in group.completions],
            rewards_G,
            correct_above=config.correct_above,
            eps=config.eps,
            ends=ends,
        )
        values.append([among_zeros(*pair) for pair in zip(rows, group.completions, strict=True)])
        for row_T, advantage in zip(rows, group_advantages(rewards_G, eps=config.eps), strict=True):
            shift += Mean.of((row_T - advantage).abs())
    return Advantages(values=values, metrics={"ktae/shift": shift})
