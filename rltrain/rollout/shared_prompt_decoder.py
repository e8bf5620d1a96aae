"""The fast decoder: one prompt cache per group, own tokens written in place, no masks built by the model.

Attention of one new token of row b, a sample of prompt p, is a softmax over two pieces that are stored apart:

    scores = [q_b · K_prompt(p) ; q_b · K_own(b)] · scale      out = softmax(scores) · [V_prompt(p) ; V_own(b)]

The G rows of a prompt share the first piece, so it is one matrix product [G·rep, D] x [D, prompt] instead of G reads
of the same cache. All rows write the same column of the second, whatever their age: the newest column is the present,
and a row masks the columns from before its birth. Hence rows can join at any step without moving the others. Several
tokens of a row may be fed at once, to be taken back but for the first few: the columns of the others are the row's
holes.

Everything is stored by kv head first, [kv head, prompt or row, ...]: the rows of a prompt are neighbours, so both views
of a query, a matrix a prompt and a matrix a row, are the same memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.nn.functional import pad

from rltrain.policy import capabilities
from rltrain.rollout.hf_decoder import left_padded, padded_positions
from rltrain.rollout.llama_step import LlamaStep
from rltrain.rollout.step_graph import StepRunner

_ATTENTION = "rltrain_shared_prompt"
# Columns allocated at a time on a CPU, and at least elsewhere. A product over the whole of a contiguous cache, unused
# columns included, is up to twice as fast on a CPU as one over a slice of a larger cache.
_BLOCK = 16
# The first columns elsewhere. Then the cache grows by a quarter: each growth is a copy, leaves memory of another size
# behind, and makes a new CUDA graph.
_FIRST_BLOCK = 64


def grown(capacity: int, device_type: str) -> int:
    """The columns of the cache after it has grown from ``capacity``."""
    if device_type == "cpu":
        return capacity + _BLOCK
    return max(_FIRST_BLOCK, capacity + -(-capacity // (4 * _BLOCK)) * _BLOCK)


def _cat_left_padded(old: Tensor, new: Tensor, dim: int) -> Tensor:
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


class _Layer:
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
        self.prompt_keys = _cat_left_padded(self.prompt_keys, keys, dim=2)
        self.prompt_values = _cat_left_padded(self.prompt_values, values, dim=2)
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


class _Layout:
    """Where rows sit when they are arranged by prompt as [P, W], W the most rows of any prompt."""

    def __init__(self, prompt_of: Sequence[int], device: torch.device) -> None:
        """``prompt_of`` is ascending and names every prompt."""
        first = {prompt: row for row, prompt in reversed(list(enumerate(prompt_of)))}
        ranks = [row - first[prompt] for row, prompt in enumerate(prompt_of)]
        self.prompts, self.width = len(first), max(ranks) + 1
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


def shared_prompt_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rollout: SharedDecoder,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface for T tokens a row; the cache has taken ``key`` and ``value`` already."""
    rows, heads, width, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    query_NHD = query.transpose(1, 2).flatten(0, 1)
    out_ND = rollout.attend(module.layer_idx, query_NHD, scale, sliding_window, softcap)
    return out_ND.view(rows, width, heads, -1), None


class SharedDecoder:
    """Same interface as :class:`~rltrain.rollout.hf_decoder.PlainDecoder`, and rows may join at any step.

    It is also the cache object that the model's layers write to.
    """

    refills = True

    def __init__(
        self, model: Any, *, pad_id: int, max_new_tokens: int, fused: bool = True, graphs: bool = False
    ) -> None:
        """``fused`` steps by :class:`LlamaStep` where that supports the model; ``graphs`` replays steps (CUDA)."""
        self._model, self._pad_id, self._device = model, pad_id, model.device
        self._max_new_tokens = max_new_tokens
        # No reference back: the weights that a step stacks or merges must go with the decoder, not with a later
        # collection of cycles.
        attend = WeakMethod(self._llama_attend)
        self._forward = (
            LlamaStep(model, lambda *arguments: attend()(*arguments))  # type: ignore[misc] - it lives while it decodes
            if fused and LlamaStep.supports(model)
            else self._transformers_forward
        )
        self.layers: list[_Layer] = []
        self.layout: _Layout
        self._prompt_of: list[int] = []  # of each row; ascending
        self._births: list[int] = []  # the first column of each row
        self._columns = 0  # in use
        self._width = 1  # tokens of a row in the present step: T; N = B·T
        self._holes_BC: Tensor | None = None
        # What a step changes is changed in place, and its layout is on the device: no step reads or sends anything.
        capturable = isinstance(self._forward, LlamaStep) and self._forward.tabulates
        self._steps = StepRunner(graphs=graphs and capturable and model.device.type == "cuda")
        self._present_T = torch.zeros(1, dtype=torch.int64, device=model.device)  # the columns to write
        self._births_B: Tensor
        self._prompt_of_B: Tensor
        # Four axes tell the model that the mask is made already; `attend` uses `bias` instead.
        self._no_mask = torch.zeros(1, 1, 1, 1, device=model.device)
        self._bias: dict[int | None, Tensor] = {}
        self._prompt_mask_PT: Tensor
        self._positions_B: Tensor
        self._last_B: Tensor  # positions of the tokens at ``max_new_tokens``; what a row is fed beyond is thrown away

    @staticmethod
    def supports(model: Any) -> bool:
        """Whether the cache can hold this model's keys and values (:func:`capabilities.cannot_share_prompts`)."""
        return capabilities.cannot_share_prompts(model) is None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Part of the cache interface; positions and masks are not derived from it here."""
        return self._columns

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Part of the cache interface: write the present columns in place."""
        self._write(layer_idx, keys.transpose(1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1))
        return keys, values

    def _write(self, layer_idx: int, key_NHD: Tensor, value_NHD: Tensor) -> None:
        layer = self.layers[layer_idx]
        shape = (-1, self._width, *key_NHD.shape[1:])
        layer.own_keys.index_copy_(2, self._present_T, key_NHD.view(shape).permute(2, 0, 1, 3))
        layer.own_values.index_copy_(2, self._present_T, value_NHD.view(shape).permute(2, 0, 1, 3))

    def attend(
        self, layer_idx: int, query_NHD: Tensor, scale: float, window: int | None, softcap: float | None = None
    ) -> Tensor:
        """[N, H·D]: the present tokens over the prompt's and the row's own keys."""
        layer, layout = self.layers[layer_idx], self.layout
        rows, heads, size = query_NHD.shape
        kv_heads, _, length, _ = layer.prompt_keys.shape
        repeats = heads // kv_heads
        query = query_NHD.new_empty(kv_heads, rows, repeats, size)
        torch.mul(query_NHD.view(rows, kv_heads, repeats, size).transpose(0, 1), scale, out=query)
        prompt_keys, own_keys, prompt_values, own_values = layer.matrices
        prompt_scores = layout.by_row(torch.bmm(layout.by_prompt(query), prompt_keys), repeats)
        own = (len(own_keys), self._width * repeats, -1)  # a matrix a row, of all its present tokens
        own_scores = torch.bmm(query.view(own), own_keys).view(kv_heads, rows, repeats, -1)
        scores = torch.cat([prompt_scores, own_scores], dim=-1)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        weights = scores.add_(self.bias(window)).softmax(-1, dtype=torch.float32).to(scores.dtype)
        from_prompt = torch.bmm(layout.by_prompt(weights[..., :length]), prompt_values)
        from_prompt = layout.by_row(from_prompt, repeats).view(own)
        out = torch.baddbmm(from_prompt, weights[..., length:].reshape(own), own_values)
        return out.view(kv_heads, rows, repeats * size).transpose(0, 1).reshape(rows, -1)

    @property
    def capacity(self) -> int:
        """Columns of the cache, those in use and those to come."""
        return self.layers[0].own_keys.shape[2] if self.layers else 0

    def cache_tokens(self, columns: int, rows: int, *, grows: bool = False, more_prompts: Sequence[int] = ()) -> int:
        """Tokens that the cache takes with its first ``rows`` rows: at least ``columns`` each, or as many more."""
        capacity = self.capacity if grows else max(self.capacity, columns)
        while grows and capacity < self._columns + columns:
            capacity = grown(capacity, self._device.type)
        prompts = self._prompt_of[rows - 1] + 1 if rows else 0
        width = max([self._prompt_mask_PT.shape[1] if rows else 0, *more_prompts])
        return (prompts + len(more_prompts)) * width + rows * capacity

    def bias(self, window: int | None) -> Tensor:
        """Additive [N, 1, prompt + own] for the present columns: 0 where a token may look, -inf elsewhere."""
        if window not in self._bias:
            self._bias[window] = self._new_bias(window)
        return self._bias[window]

    def _new_bias(self, window: int | None) -> Tensor:
        """Hidden are padding, columns from before a row's birth or after a token, holes, and what left the window."""
        births_B11 = self._births_B[:, None, None]
        length = self._prompt_mask_PT.shape[1]
        column_C = torch.arange(self.capacity, device=self._device)
        present_T1 = self._present_T[:, None]
        age_BTC = (present_T1 - column_C).expand(len(births_B11), -1, -1)
        own_BTC = (age_BTC >= 0) & (column_C >= births_B11)
        prompt_age_BTL = present_T1 - births_B11 + length - torch.arange(length, device=self._device)
        if self._holes_BC is not None:
            own_BTC = own_BTC & ~self._holes_BC[:, None]
            since_BC = self._holes_BC.flip(1).cumsum(1).flip(1)  # holes from this column on
            age_BTC = age_BTC - since_BC[:, None]
            prompt_age_BTL = prompt_age_BTL - since_BC[:, None, :1]
        prompt_BTL = self._prompt_mask_PT[self._prompt_of_B].bool()[:, None]
        seen_BTX = torch.cat([prompt_BTL.expand(-1, self._width, -1), own_BTC], dim=-1)
        if window is not None:
            seen_BTX &= torch.cat([prompt_age_BTL, age_BTC], dim=-1) < window
        seen_NX = seen_BTX.flatten(0, 1)
        zeros_NX = torch.zeros(seen_NX.shape, dtype=self.layers[0].own_keys.dtype, device=self._device)
        return zeros_NX.masked_fill_(~seen_NX, -torch.inf)[:, None]

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """Dispatch the model's attention to ours; an implementation unknown to its mask code also builds no mask."""
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION, shared_prompt_attention)
        config = self._model.config
        before = config._attn_implementation
        config._attn_implementation = _ATTENTION
        try:
            yield
        finally:
            config._attn_implementation = before

    def admit(
        self, prompts: Sequence[Sequence[int]], group_size: int, new_tokens_fed: Sequence[int] | None = None
    ) -> Tensor:
        """Logits [P·G, V] of the next tokens; the rows of a prompt are neighbours and follow those in flight.

        ``new_tokens_fed`` says how many of a prompt's last tokens count as new ones.
        """
        prefilled = self._prefill(prompts, new_tokens_fed or [0] * len(prompts))
        return self.admit_prefilled(prefilled, [group_size] * len(prompts))

    def _prefill(self, prompts: Sequence[Sequence[int]], new_tokens_fed: Sequence[int]) -> Prefilled:
        from transformers import DynamicCache

        ids_PT, mask_PT = left_padded(prompts, self._pad_id, self._device)
        cache: Any = DynamicCache()
        logits_PV = self._model(
            input_ids=ids_PT,
            attention_mask=mask_PT,
            position_ids=padded_positions(mask_PT),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        # Taken out one by one, so that no two copies of all layers exist.
        taken = (cache.layers.pop(0) for _ in range(len(cache.layers)))
        by_head = ((new.keys.transpose(0, 1).contiguous(), new.values.transpose(0, 1).contiguous()) for new in taken)
        new_tokens_P = self._max_new_tokens - torch.tensor(new_tokens_fed, device=self._device)
        return Prefilled(layers=by_head, mask_PT=mask_PT, logits_PV=logits_PV, new_tokens_P=new_tokens_P)

    def admit_prefilled(self, prefilled: Prefilled, rows: Sequence[int]) -> Tensor:
        """Logits [B, V] of the first tokens of ``rows[p]`` rows for each prefilled prompt p, at least 1.

        The rows of a prompt are neighbours and follow those in flight.
        """
        rows_P = torch.tensor(rows, device=self._device)
        mask_PT = prefilled.mask_PT
        next_positions_B = mask_PT.sum(-1).repeat_interleave(rows_P)
        last_B = next_positions_B + prefilled.new_tokens_P.repeat_interleave(rows_P) - 1
        if isinstance(self._forward, LlamaStep):
            self._forward.prepare(mask_PT.shape[1] + self._max_new_tokens)
        if self._births:
            for layer, (keys, values) in zip(self.layers, prefilled.layers, strict=True):
                layer.admit_prompts(keys, values)
            self._prompt_mask_PT = _cat_left_padded(self._prompt_mask_PT, mask_PT, dim=1)
            self._positions_B = torch.cat([self._positions_B, next_positions_B])
            self._last_B = torch.cat([self._last_B, last_B])
        else:
            self.layers = [_Layer(keys, values) for keys, values in prefilled.layers]
            self._prompt_mask_PT, self._positions_B, self._last_B = mask_PT, next_positions_B, last_B
            self._columns, self._holes_BC = 0, None
        first = self._prompt_of[-1] + 1 if self._prompt_of else 0
        self._prompt_of += [first + p for p, count in enumerate(rows) for _ in range(count)]
        self._births += [self._columns] * sum(rows)
        for layer in self.layers:
            layer.add_rows(sum(rows))
        if self._holes_BC is not None:
            self._holes_BC = pad(self._holes_BC, (0, 0, 0, sum(rows)))
        self._lay_out()
        return prefilled.logits_PV.repeat_interleave(rows_P, dim=0)

    def _lay_out(self) -> None:
        self.layout = _Layout([prompt for prompt in self._prompt_of for _ in range(self._width)], self._device)
        self._births_B = torch.tensor(self._births, device=self._device)
        self._prompt_of_B = torch.tensor(self._prompt_of, device=self._device)
        self._bias = {}
        self._steps.changed()

    def _open(self, columns: int) -> None:
        """Open the present columns, at most ``_BLOCK``; ``_show`` must follow."""
        if self._columns + columns > self.capacity:
            count = grown(self.capacity, self._device.type) - self.capacity
            for layer in self.layers:
                layer.add_columns(count)
            if self._holes_BC is not None:
                self._holes_BC = pad(self._holes_BC, (0, count))
            self._bias = {}
            self._steps.changed()
        if columns == 1:
            self._present_T.fill_(self._columns)
        else:
            self._present_T = torch.arange(self._columns, self._columns + columns, device=self._device)
        self._columns += columns

    def _show(self) -> None:
        """Let every row look at the present columns."""
        self._bias = {window: bias for window, bias in self._bias.items() if window is None}
        for bias in self._bias.values():
            bias.index_fill_(-1, self._present_T + self._prompt_mask_PT.shape[1], 0)

    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits [B, V] after one more token in every row."""
        self._open(1)
        logits_BV = self._steps(self._present_logits, tokens_B)
        self._positions_B += 1
        return logits_BV

    def _present_logits(self, tokens_B: Tensor) -> Tensor:
        """Logits [B, V] of tokens in the present column. Doing it again changes nothing."""
        self._show()
        return self._forward(tokens_B, torch.minimum(self._positions_B, self._last_B))

    def verify(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V] after each of T more tokens in every row, at most ``_BLOCK``; ``accept`` must follow."""
        self._set_width(tokens_BT.shape[1])
        self._open(self._width)
        self._show()
        positions_BT = self._positions_B[:, None] + torch.arange(self._width, device=self._device)
        positions_BT = torch.minimum(positions_BT, self._last_B[:, None])
        logits_NV = self._forward(tokens_BT.flatten(), positions_BT.flatten())
        return logits_NV.unflatten(0, tokens_BT.shape)

    def accept(self, counts_B: Tensor) -> None:
        """Keep so many of the verified tokens in each row, from the first; the columns of the others are holes."""
        if self._holes_BC is None:
            self._holes_BC = torch.zeros(len(self._births), self.capacity, dtype=torch.bool, device=self._device)
        offset_T = torch.arange(self._width, device=self._device)
        self._holes_BC[:, self._columns - self._width : self._columns] = offset_T >= counts_B[:, None]
        self._positions_B = self._positions_B + counts_B
        self._set_width(1)
        longest = int((self._positions_B - self._last_B).max()) + self._max_new_tokens - 1
        if self._columns > 2 * longest + _BLOCK:
            self._close_holes()

    def _close_holes(self) -> None:
        """Move the tokens of each row to its last columns; keys know their positions, so that only order counts."""
        assert self._holes_BC is not None
        column_C = torch.arange(self._columns, device=self._device)
        kept_BC = (column_C >= self._births_B[:, None]) & ~self._holes_BC[:, : self._columns]
        fed = kept_BC.sum(1).tolist()
        most = max(fed)
        self._births = [most - count for count in fed]
        order_BC = kept_BC.byte().argsort(dim=1, stable=True)[:, self._columns - most :]
        for layer in self.layers:
            layer.take_columns(order_BC)
        self._columns, self._holes_BC = most, None
        self._lay_out()

    def _set_width(self, width: int) -> None:
        self._width = width
        self._present_T = self._present_T.new_zeros(width)
        self._lay_out()

    def _llama_attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        self._write(layer_idx, key, value)
        return self.attend(layer_idx, query, scale, window)

    def _transformers_forward(self, tokens_N: Tensor, positions_N: Tensor) -> Tensor:
        with self._attention():
            logits_BTV = self._model(
                input_ids=tokens_N.view(-1, self._width),
                position_ids=positions_N.view(-1, self._width),
                attention_mask=self._no_mask,
                past_key_values=self,
                use_cache=True,
                rollout=self,
            ).logits
        return logits_BTV.flatten(0, 1)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, the prompts that have none left, and the columns that are older than all."""
        rows_B = torch.tensor(rows, device=self._device, dtype=torch.int64)
        alive = sorted({self._prompt_of[row] for row in rows})
        fewer = len(alive) < self.layout.prompts
        prompts_P = torch.tensor(alive, device=self._device, dtype=torch.int64) if fewer else None
        births = [self._births[row] for row in rows]
        first_column = min(births, default=self._columns)
        self._births = [birth - first_column for birth in births]
        self._columns -= first_column
        for layer in self.layers:
            layer.keep(rows_B, prompts_P, first_column)
        if self._holes_BC is not None:
            self._holes_BC = self._holes_BC[rows_B, first_column:]
        if prompts_P is not None:
            self._prompt_mask_PT = self._prompt_mask_PT[prompts_P]
        renumbered = {prompt: index for index, prompt in enumerate(alive)}
        self._prompt_of = [renumbered[self._prompt_of[row]] for row in rows]
        self._positions_B, self._last_B = self._positions_B[rows_B], self._last_B[rows_B]
        self._bias = {}
        self._steps.changed()
        if rows:
            self._lay_out()
