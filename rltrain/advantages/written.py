"""Which ids of a completion the model wrote. The others are an environment's: no advantage, and in no statistic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rltrain.advantages.rewards import as_rewards
from rltrain.types import Completion, Context, Group


def written_mask(completion: Completion) -> Tensor:
    """Whether the model wrote each id, bool [T]."""
    if not completion.turns:
        return torch.ones(len(completion.token_ids), dtype=torch.bool)
    return torch.tensor(completion.written_T, dtype=torch.bool)


def written_values(row_T: Tensor, completion: Completion) -> Tensor:
    """The values at the written ids, [W]."""
    return row_T[written_mask(completion)] if completion.turns else row_T


def among_zeros(row_W: Tensor, completion: Completion) -> Tensor:
    """Values of the written ids at their places, and 0 at observed ids, [T]."""
    if not completion.turns:
        return row_W
    mask_T = written_mask(completion)
    return torch.zeros(len(mask_T), dtype=row_W.dtype).masked_scatter(mask_T, row_W)


def counted_tokens(groups: Sequence[Group], kept: Sequence[Sequence[bool]] | None = None) -> list[list[Tensor]]:
    """Which ids are in a statistic over tokens, bool ``[p][g][T]``: the written ones of the completions ``kept``.

    Without ``kept`` those whose reward counts, which is not NaN.
    """
    flags = kept or [(~as_rewards(group.rewards_G).isnan()).tolist() for group in groups]
    return [
        [written_mask(completion) & keep for completion, keep in zip(group.completions, row, strict=True)]
        for group, row in zip(groups, flags, strict=True)
    ]


def written_masks(groups: Sequence[Group]) -> list[list[Tensor]]:
    """:func:`written_mask` of every completion, ``[p][g][T]``."""
    return [[written_mask(completion) for completion in group.completions] for group in groups]


def written_entropies(groups: Sequence[Group], context: Context) -> list[list[Tensor]]:
    """Entropies at the ids that the policy wrote, float64 ``[p][g][W]``. All ranks call this together."""
    return [
        [
            written_values(token.entropy_T.double(), completion)
            for token, completion in zip(row, group.completions, strict=True)
        ]
        for group, row in zip(groups, context.entropy(groups), strict=True)
    ]
