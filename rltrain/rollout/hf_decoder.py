"""Decoders for any causal language model of transformers: with its own cache, or without any."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rltrain.policy.head import own_logits


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and 0/1 mask, both int64 [P, longest]."""
    width = max(len(ids) for ids in prompts)
    ids_PT = torch.tensor([[pad_id] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask_PT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    return ids_PT, mask_PT


def padded_positions(mask_PT: Tensor) -> Tensor:
    """Positions that count real tokens only; padding sits at 0."""
    return (mask_PT.cumsum(-1) - 1).clamp_(min=0)


class PlainDecoder:
    """Left padding, and one wave of rows.

    ``admit`` prefills each prompt once and repeats its cache G times; ``step`` feeds one token per row.
    """

    refills = False

    def __init__(self, model: Any, *, pad_id: int) -> None:
        self._model = model
        self._pad_id = pad_id
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        # Purely recurrent models name their state so, and take a mask with the prompt only.
        self._recurrent = "past_key_values" not in parameters
        self._cache_name = "cache_params" if self._recurrent else "past_key_values"
        self._cache: Any = None
        self._mask_BT: Tensor

    def _forward(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        positions = {"position_ids": positions_BT} if self._takes_positions else {}
        output = self._model(
            input_ids=ids_BT,
            attention_mask=None if self._recurrent and self._cache is not None else self._mask_BT,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_name: self._cache},
            **positions,
        )
        self._cache = output[self._cache_name]
        return output.logits[:, -1]

    def admit(self, prompts: Sequence[Sequence[int]], group_size: int) -> Tensor:
        """Logits [P·G, V] of the first tokens; the rows of a prompt are neighbours."""
        ids_PT, self._mask_BT = left_padded(prompts, self._pad_id, self._model.device)
        self._cache = None
        logits_PV = self._forward(ids_PT, padded_positions(self._mask_BT))
        self._select(torch.arange(len(prompts)).repeat_interleave(group_size))
        return logits_PV.repeat_interleave(group_size, dim=0)

    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits [B, V] after one more token in every row."""
        self._mask_BT = torch.nn.functional.pad(self._mask_BT, (0, 1), value=1)
        return self._forward(tokens_B[:, None], self._mask_BT.sum(-1, keepdim=True) - 1)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self._select(torch.tensor(rows, dtype=torch.int64))

    def _select(self, rows_B: Tensor) -> None:
        rows_B = rows_B.to(self._mask_BT.device)
        # Meant for beams, and the one selection that every kind of layer has, recurrent states included.
        self._cache.reorder_cache(rows_B)
        self._mask_BT = self._mask_BT[rows_B]


class UncachedDecoder:
    """Same interface. Every token forwards all rows again from their first token: slow, and right for every model."""

    refills = True

    def __init__(self, model: Any, *, pad_id: int) -> None:
        self._model, self._pad_id = model, pad_id
        self._rows: list[list[int]] = []

    def admit(self, prompts: Sequence[Sequence[int]], group_size: int) -> Tensor:
        """Logits [P·G, V] of the first tokens; the rows of a prompt are neighbours and follow those in flight."""
        self._rows += [list(ids) for ids in prompts for _ in range(group_size)]
        return self._logits(prompts).repeat_interleave(group_size, dim=0)

    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits [B, V] after one more token in every row."""
        for row, token in zip(self._rows, tokens_B.tolist(), strict=True):
            row.append(token)
        return self._logits(self._rows)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self._rows = [self._rows[index] for index in rows]

    def _logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        # Padding lies to the right, where a causal model does not look.
        longest = max(map(len, rows))
        ids_BT = torch.tensor([[*ids, *[self._pad_id] * (longest - len(ids))] for ids in rows])
        last_B = torch.tensor([index * longest + len(ids) - 1 for index, ids in enumerate(rows)])
        device = self._model.device
        return own_logits(self._model, {"input_ids": ids_BT.to(device)}, last_B.to(device))
