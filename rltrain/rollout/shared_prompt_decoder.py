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

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.nn.functional import pad

from rltrain.policy import capabilities
from rltrain.rollout.hf_decoder import left_padded, padded_positions
from rltrain.rollout.llama_step import LlamaStep
from rltrain.rollout.shared_cache import BLOCK, CacheLayer, Prefilled, RowLayout, cat_left_padded
from rltrain.rollout.shared_cache import grown as grown
from rltrain.rollout.step_graph import StepRunner

_ATTENTION = "rltrain_shared_prompt"


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
        self.layers: list[CacheLayer] = []
        self.layout: RowLayout
        self._prompt_of: list[int] = []  # of each row; ascending
        self._births: list[int] = []  # the first column of each row
        self._columns = 0  # in use
        self._width = 1  # tokens of a row in the present step: T; N = B·T
        self._holes_BC: Tensor | None = None
        self._fed: SharedDecoder | None = None  # what stands for some of the rows while they alone are fed
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
            self._prompt_mask_PT = cat_left_padded(self._prompt_mask_PT, mask_PT, dim=1)
            self._positions_B = torch.cat([self._positions_B, next_positions_B])
            self._last_B = torch.cat([self._last_B, last_B])
        else:
            self.layers = [CacheLayer(keys, values) for keys, values in prefilled.layers]
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
        prompt_of = [prompt for prompt in self._prompt_of for _ in range(self._width)]
        self.layout = RowLayout(prompt_of, self._device, prompts=len(self._prompt_mask_PT))
        self._births_B = torch.tensor(self._births, device=self._device)
        self._prompt_of_B = torch.tensor(self._prompt_of, device=self._device)
        self._bias = {}
        self._steps.changed()

    def _reserve(self, columns: int) -> None:
        """Grow until so many more columns fit."""
        while self._columns + columns > self.capacity:
            count = grown(self.capacity, self._device.type) - self.capacity
            for layer in self.layers:
                layer.add_columns(count)
            if self._holes_BC is not None:
                self._holes_BC = pad(self._holes_BC, (0, count))
            self._bias = {}
            self._steps.changed()

    def _open(self, columns: int) -> None:
        """Open the present columns, at most ``BLOCK``; ``_show`` must follow."""
        self._reserve(columns)
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
        """Logits [B, T, V] after each of T more tokens in every row, at most ``BLOCK``; ``accept`` must follow."""
        self._set_width(tokens_BT.shape[1])
        self._open(self._width)
        self._show()
        positions_BT = self._positions_B[:, None] + torch.arange(self._width, device=self._device)
        positions_BT = torch.minimum(positions_BT, self._last_B[:, None])
        logits_NV = self._forward(tokens_BT.flatten(), positions_BT.flatten())
        return logits_NV.unflatten(0, tokens_BT.shape)

    def accept(self, counts_B: Tensor) -> None:
        """Keep so many of the verified tokens in each row, from the first; the columns of the others are holes."""
        offset_T = torch.arange(self._width, device=self._device)
        self._holes()[:, self._columns - self._width : self._columns] = offset_T >= counts_B[:, None]
        self._positions_B = self._positions_B + counts_B
        self._set_width(1)
        self._close_many_holes()

    def feed(self, rows: Sequence[int], starts: Sequence[int], ids: Sequence[Sequence[int]]) -> Tensor:
        """Logits [R, V] after more tokens in some rows, ascending: ``ids[r]`` from position ``starts[r]`` on.

        What these rows were fed at that position and behind it is forgotten. The others stay as they are.
        """
        rows_R, starts_R = self._tensor(rows), self._tensor(starts)
        counts_R, width, columns = self._tensor([len(each) for each in ids]), max(map(len, ids)), self._columns
        kept_RC = self._kept(rows_R, starts_R)
        part = self._part(rows, kept_RC, counts_R)
        tokens_RT, _ = left_padded(ids, self._pad_id, self._device)
        offset_RT = torch.arange(width, device=self._device) - (width - counts_R)[:, None]
        logits_RV = self._fed_logits(part, tokens_RT, (starts_R[:, None] + offset_RT).clamp(min=0))
        ends_R = (pad(kept_RC, (1, 0)) * torch.arange(columns + 1, device=self._device)).amax(1)
        short = int((torch.maximum(ends_R, self._births_B[rows_R]) + counts_R).max()) - columns
        self._reserve(max(0, short))
        self._columns += max(0, short)
        self._note_fed(rows_R, kept_RC, counts_R, before=columns)
        part_rows_N, offset_N = (offset_RT >= 0).nonzero(as_tuple=True)
        places = (rows_R[part_rows_N], self._columns - width + offset_N)
        for layer, of_part in zip(self.layers, part.layers, strict=True):
            layer.put(of_part, places, (part_rows_N, columns + offset_N))
        self._positions_B[rows_R] = starts_R + counts_R
        self._bias = {}
        self._steps.changed()
        self._close_many_holes()
        return logits_RV

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self._device)

    def _holes(self) -> Tensor:
        if self._holes_BC is None:
            self._holes_BC = torch.zeros(len(self._births), self.capacity, dtype=torch.bool, device=self._device)
        return self._holes_BC

    def _kept(self, rows_R: Tensor, starts_R: Tensor) -> Tensor:
        """[R, columns in use]: those that hold a row's tokens before the positions ``starts_R``."""
        fed_R = starts_R - self._prompt_mask_PT.sum(-1)[self._prompt_of_B[rows_R]]
        column_C = torch.arange(self._columns, device=self._device)
        full_RC = (column_C >= self._births_B[rows_R][:, None]) & ~self._holes()[rows_R, : self._columns]
        return full_RC & (full_RC.cumsum(1) <= fed_R[:, None])

    def _part(self, rows: Sequence[int], kept_RC: Tensor, counts_R: Tensor) -> SharedDecoder:
        """Some rows alone, with columns for their new tokens, which end together."""
        part, rows_R, width = copy.copy(self), self._tensor(rows), int(counts_R.max())
        part.layers = [layer.part(rows_R, self._columns, width) for layer in self.layers]
        part._prompt_of, part._births = ([each[row] for row in rows] for each in (self._prompt_of, self._births))
        part._width, part._columns = width, self._columns + width
        part._present_T = torch.arange(self._columns, part._columns, device=self._device)
        offset_T = torch.arange(width, device=self._device)
        part._holes_BC = torch.cat([~kept_RC, offset_T < (width - counts_R)[:, None]], dim=1)
        part._holes_BC &= torch.arange(part._columns, device=self._device) >= self._births_B[rows_R][:, None]
        part._lay_out()
        return part

    def _fed_logits(self, part: SharedDecoder, tokens_RT: Tensor, positions_RT: Tensor) -> Tensor:
        """Logits [R, V] of the last tokens of a part's rows."""
        if not isinstance(self._forward, LlamaStep):
            return part._transformers_forward(tokens_RT.flatten(), positions_RT.flatten(), logits_to_keep=1)
        rows, width = tokens_RT.shape
        last_R = torch.arange(width - 1, rows * width, width, device=self._device)
        self._fed = part
        try:
            return self._forward(tokens_RT.flatten(), positions_RT.flatten(), last_R)
        finally:
            self._fed = None

    def _note_fed(self, rows_R: Tensor, kept_RC: Tensor, counts_R: Tensor, *, before: int) -> None:
        """Of the fed rows all columns but those kept and the newest are holes, of the others those that were opened."""
        holes_BC, column_C = self._holes(), torch.arange(self._columns, device=self._device)
        holes_BC[:, before : self._columns] = True
        seen_RC = pad(kept_RC, (0, self._columns - before)) | (column_C >= self._columns - counts_R[:, None])
        holes_BC[rows_R, : self._columns] = (column_C >= self._births_B[rows_R][:, None]) & ~seen_RC

    def _close_many_holes(self) -> None:
        longest = int((self._positions_B - self._last_B).max()) + self._max_new_tokens - 1
        if self._columns > 2 * longest + BLOCK:
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
        rows = self._fed or self
        rows._write(layer_idx, key, value)
        return rows.attend(layer_idx, query, scale, window)

    def _transformers_forward(self, tokens_N: Tensor, positions_N: Tensor, *, logits_to_keep: int = 0) -> Tensor:
        with self._attention():
            logits_BTV = self._model(
                input_ids=tokens_N.view(-1, self._width),
                position_ids=positions_N.view(-1, self._width),
                attention_mask=self._no_mask,
                past_key_values=self,
                use_cache=True,
                rollout=self,
                logits_to_keep=logits_to_keep,
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
