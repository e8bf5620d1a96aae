"""Where the decoder that shares prompts keeps keys and values, and how its rows are arranged by prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

# Columns allocated at a time on a CPU, and at least elsewhere. A product over the whole of a contiguous cache, unused
# columns included, is up to twice as fast on a CPU as one over a slice of a larger cache.
BLOCK = 16
# The first columns elsewhere. Then the cache grows by a quarter: each growth is a copy, leaves memory of another size
# behind, and makes a new CUDA graph.
_FIRST_BLOCK = 64


def grown(capacity: int, device_type: str) -> int:
    """The columns of the cache after it has grown from ``capacity``."""
    if device_type == "cpu":
        return capacity + BLOCK
    return max(_FIRST_BLOCK, capacity + -(-capacity // (4 * BLOCK)) * BLOCK)


def cat_left_padded(old: Tensor, new: Tensor, dim: int) -> Tensor:
    """Concatenate along the axis before ``dim``; along ``dim`` the shorter side is padded on the left."""
    width = max(old.shape[dim], new.shape[dim])
    trailing = (0, 0) * (old.ndim - 1 - dim)
    return torch.cat([pad(x, (*trailing, width - x.shape[dim], 0)) for x in (old, new)], dim - 1)


def _with_columns(old: Tensor, count: int) -> Tensor:
    """``count`` columns of zeros on the right."""
    heads, rows, columns, size = old.shape
    new = old.new_empty(heads, rows, columns + count, size)
    new[:, :, :columns] = old
    new[:, :, columns:] = 0
    return new


class CacheLayer:
    """Keys and values of one layer; axes [kv head, prompt or row, token, head dim].

    Unused columns hold zeros, because a masked score of weight 0 still multiplies its value. ``matrices`` are views of
    prompt keys, own keys, prompt values and own values as batched products take them, keys transposed.
    """

    def __init__(self, prompt_keys: Tensor, prompt_values: Tensor) -> None:
        self.prompt_keys, self.prompt_values = prompt_keys, prompt_values
        self.own_keys = prompt_keys.new_zeros(len(prompt_keys), 0, 0, prompt_keys.shape[-1])
        self.own_values = prompt_values.new_zeros(len(prompt_values), 0, 0, prompt_values.shape[-1])
        self._look()

    def _look(self) -> None:
        keys = (x.flatten(0, 1).mT for x in (self.prompt_keys, self.own_keys))
        values = (x.flatten(0, 1) for x in (self.prompt_values, self.own_values))
        self.matrices = (*keys, *values)

    def admit_prompts(self, keys: Tensor, values: Tensor) -> None:
        self.prompt_keys = cat_left_padded(self.prompt_keys, keys, dim=2)
        self.prompt_values = cat_left_padded(self.prompt_values, values, dim=2)
        self._look()

    def add_rows(self, count: int) -> None:
        self.own_keys = pad(self.own_keys, (0, 0, 0, 0, 0, count))
        self.own_values = pad(self.own_values, (0, 0, 0, 0, 0, count))
        self._look()

    def add_columns(self, count: int) -> None:
        self.own_keys = _with_columns(self.own_keys, count)
        self.own_values = _with_columns(self.own_values, count)
        self._look()

    def take_columns(self, columns_BC: Tensor) -> None:
        index = columns_BC[None, :, :, None]
        self.own_keys, self.own_values = (
            x.gather(2, index.expand(len(x), -1, -1, x.shape[-1])) for x in (self.own_keys, self.own_values)
        )
        self._look()

    def part(self, rows_R: Tensor, columns: int, more: int) -> CacheLayer:
        """A copy of the first ``columns`` of some rows, with room for ``more``; the prompts are these."""
        layer = CacheLayer(self.prompt_keys, self.prompt_values)
        layer.own_keys = pad(self.own_keys[:, rows_R, :columns], (0, 0, 0, more))
        layer.own_values = pad(self.own_values[:, rows_R, :columns], (0, 0, 0, more))
        layer._look()
        return layer

    def put(self, part: CacheLayer, places: tuple[Tensor, Tensor], part_places: tuple[Tensor, Tensor]) -> None:
        """Write tokens of a part here; places are rows and columns."""
        (rows_N, columns_N), (part_rows_N, part_columns_N) = places, part_places
        self.own_keys[:, rows_N, columns_N] = part.own_keys[:, part_rows_N, part_columns_N]
        self.own_values[:, rows_N, columns_N] = part.own_values[:, part_rows_N, part_columns_N]

    def keep(self, rows_B: Tensor, prompts_P: Tensor | None, first_column: int) -> None:
        self.own_keys = self.own_keys[:, :, first_column:].index_select(1, rows_B)
        self.own_values = self.own_values[:, :, first_column:].index_select(1, rows_B)
        if prompts_P is not None:
            self.prompt_keys = self.prompt_keys.index_select(1, prompts_P)
            self.prompt_values = self.prompt_values.index_select(1, prompts_P)
        self._look()


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """Left-padded prompts after their forward: of each layer keys and values [kv head, P, T, head dim], mask, logits.

    ``layers`` is read once, from first to last. Zeros in ``mask_PT`` [P, T] are padding; ``logits_PV`` follow the last
    token of each prompt. Its rows have at most ``new_tokens_P`` new tokens each.
    """

    layers: Iterable[tuple[Tensor, Tensor]]
    mask_PT: Tensor
    logits_PV: Tensor
    new_tokens_P: Tensor


class RowLayout:
    """Where rows sit when they are arranged by prompt as [P, W], W the most rows of any prompt."""

    def __init__(self, prompt_of: Sequence[int], device: torch.device, *, prompts: int | None = None) -> None:
        """``prompt_of`` is ascending. It names every prompt, unless there are ``prompts`` of them."""
        first = {prompt: row for row, prompt in reversed(list(enumerate(prompt_of)))}
        ranks = [row - first[prompt] for row, prompt in enumerate(prompt_of)]
        self.prompts, self.width = len(first) if prompts is None else prompts, max(ranks) + 1
        slots = [prompt * self.width + rank for prompt, rank in zip(prompt_of, ranks, strict=True)]
        dense = len(slots) == self.prompts * self.width
        self._slots_B = None if dense else torch.tensor(slots, device=device)

    def by_prompt(self, x_HBRX: Tensor) -> Tensor:
        """[H, B, R, X] -> [H·P, W·R, X]; zeros where a prompt has fewer than W rows."""
        heads, _, repeats, size = x_HBRX.shape
        if self._slots_B is not None:
            padded = x_HBRX.new_zeros(heads, self.prompts * self.width, repeats, size)
            x_HBRX = padded.index_copy_(1, self._slots_B, x_HBRX)
        return x_HBRX.view(heads * self.prompts, self.width * repeats, size)

    def by_row(self, x_PWX: Tensor, repeats: int) -> Tensor:
        """The inverse: [H·P, W·R, X] -> [H, B, R, X]."""
        x = x_PWX.view(-1, self.prompts * self.width, repeats, x_PWX.shape[-1])
        return x if self._slots_B is None else x.index_select(1, self._slots_B)
