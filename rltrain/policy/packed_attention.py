"""Attention over packed tokens. Segments lie end to end, and each attends to its past and to its prefix, if any.

All other modules of a decoder act on single tokens, so they run on [1, L] without padding. Attention gathers queries
and keys into rows, with rows of similar length in one call (:func:`rltrain.batching.bins.attention_calls`):

    out_s = softmax(q_s · [K_prefix(s) ; K_s] · scale, token i over keys j <= |prefix| + i) · [V_prefix(s) ; V_s]

A row's padding lies to the right of its tokens, where the causal mask hides it. On CUDA the two pieces are two calls
of the flash kernel (:mod:`rltrain.policy.merged_attention`); elsewhere a mask does for both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rltrain.batching.bins import attention_calls, costs_of
from rltrain.policy.merged_attention import merged_attention, takes_flash
from rltrain.types import TokenBatch

_NAME = "rltrain_segments"


def gather(values_LX: Tensor, index: Tensor) -> Tensor:
    """``values_LX[index]``, as an embedding: on a CPU its backward is far faster than that of indexing."""
    return functional.embedding(index, values_LX)


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """The segments of one call as padded rows: the places in L of the queries and keys of B rows."""

    query_BQ: Tensor
    key_BK: Tensor

    @property
    def prefix(self) -> int:
        return self.key_BK.shape[1] - self.query_BQ.shape[1]

    def is_plain(self, window: int | None) -> bool:
        """Whether the mask is the usual causal one, which needs no tensor."""
        return not self.prefix and (window is None or self.query_BQ.shape[1] <= window)

    def mask(self, window: int | None) -> Tensor:
        """Bool [Q, K]: query i sits at ``prefix + i`` among the keys, and sees the last ``window`` of them."""
        keys = self.key_BK.shape[1]
        place_Q1 = torch.arange(self.prefix, keys, device=self.key_BK.device)[:, None]
        key_K = torch.arange(keys, device=self.key_BK.device)
        seen_QK = key_K <= place_Q1
        return seen_QK if window is None else seen_QK & (key_K > place_Q1 - window)


class SegmentAttention:
    """The attention calls of a packed micro-batch, which are the same in every layer."""

    def __init__(self, batch: TokenBatch, hidden_size: int, *, merge: bool | None = None) -> None:
        """``merge`` says whether prefix and row are merged by log-sum-exp; None: where the flash kernel takes them."""
        assert batch.prefix_S is not None
        self._merge = merge
        boundaries, prefix_of = batch.boundaries_S1.tolist(), batch.prefix_S.tolist()
        sizes = [stop - start for start, stop in itertools.pairwise(boundaries)]
        segments = [(size, sizes[prefix] if prefix >= 0 else 0) for size, prefix in zip(sizes, prefix_of, strict=True)]
        device = batch.input_ids_L.device
        self.calls: list[AttentionCall] = []
        slot_L = torch.empty(len(batch.input_ids_L), dtype=torch.long)
        first_slot = 0
        for indices in attention_calls(segments, hidden_size, costs_of(device.type)):
            column_Q = torch.arange(segments[indices[0]][0])
            start_B1 = torch.tensor([[boundaries[i]] for i in indices])
            length_B1 = torch.tensor([[sizes[i]] for i in indices])
            query_BQ = start_B1 + torch.minimum(column_Q, length_B1 - 1)
            prefix_B1 = torch.tensor([[boundaries[max(prefix_of[i], 0)]] for i in indices])
            key_BK = torch.cat([prefix_B1 + torch.arange(segments[indices[0]][1]), query_BQ], dim=1)
            slots_BQ = first_slot + torch.arange(query_BQ.numel()).view_as(query_BQ)
            real_BQ = column_Q < length_B1
            slot_L[query_BQ[real_BQ]] = slots_BQ[real_BQ]
            first_slot += query_BQ.numel()
            self.calls.append(AttentionCall(query_BQ=query_BQ.to(device), key_BK=key_BK.to(device)))
        self._slot_L = slot_L.to(device)
        self._query_S = torch.cat([call.query_BQ.flatten() for call in self.calls])
        self._key_S = torch.cat([call.key_BK.flatten() for call in self.calls])
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def attend(
        self,
        query_HLD: Tensor,
        key_HLD: Tensor,
        value_HLD: Tensor,
        *,
        scale: float | None,
        window: int | None,
        softcap: float | None,
        dropout: float,
    ) -> Tensor:
        """Outputs [L, H, D]. Keys and values may have fewer heads, each for several heads of queries."""
        # A single gather for all calls, because the backward of a gather is a sum over all L.
        (queries,) = self._gathered(self._query_S, [call.query_BQ for call in self.calls], query_HLD)
        keys, values = self._gathered(self._key_S, [call.key_BK for call in self.calls], key_HLD, value_HLD)
        rows = []
        for index, (call, query, key, value) in enumerate(zip(self.calls, queries, keys, values, strict=True)):
            if softcap is not None:
                out = _capped_attention(query, key, value, self._mask(index, window), scale, softcap, dropout)
            elif self._merges(call, query, key, window, dropout):
                out = merged_attention(query, key, value, prefix=call.prefix, scale=scale)
            else:
                mask = None if call.is_plain(window) else self._mask(index, window)
                out = _fused_attention(query, key, value, mask, scale, dropout)
            rows.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
        return gather(torch.cat(rows), self._slot_L).unflatten(-1, (len(query_HLD), -1))

    def _merges(self, call: AttentionCall, query: Tensor, key: Tensor, window: int | None, dropout: float) -> bool:
        """Whether a row's prefix is attended apart: only where no window cuts it, and no weight is dropped."""
        whole = bool(call.prefix) and dropout == 0 and (window is None or call.key_BK.shape[1] <= window)
        return whole and (takes_flash(query, key) if self._merge is None else self._merge)

    def _gathered(self, index_S: Tensor, places: Sequence[Tensor], *values_HLD: Tensor) -> list[list[Tensor]]:
        """For each of the values, its rows [B, H, Q, D] in every call."""
        values_LX = torch.cat([x.transpose(0, 1).flatten(1) for x in values_HLD], dim=1)
        parts = gather(values_LX, index_S).split([place.numel() for place in places])
        widths = [len(x) * x.shape[2] for x in values_HLD]
        by_value = zip(*(part.split(widths, dim=1) for part in parts), strict=True)
        return [
            [part.view(*place.shape, len(x), -1).transpose(1, 2) for part, place in zip(parts_x, places, strict=True)]
            for x, parts_x in zip(values_HLD, by_value, strict=True)
        ]

    def _mask(self, index: int, window: int | None) -> Tensor:
        if (index, window) not in self._masks:
            self._masks[index, window] = self.calls[index].mask(window)
        return self._masks[index, window]


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask_QK: Tensor | None, scale: float | None, dropout: float
) -> Tensor:
    """Attention of torch, causal where there is no mask.

    On CUDA grouped heads would leave the slow math kernel alone where flash does not apply, so they are repeated.
    """
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and (mask_QK is not None or not takes_flash(query, key)):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        grouped = False
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask_QK,
        is_causal=mask_QK is None,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=grouped,
    )


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask_QK: Tensor, scale: float | None, softcap: float, dropout: float
) -> Tensor:
    """Scores pass through ``c·tanh(u/c)`` before the mask (Gemma 2), which no fused kernel of torch does."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask_QK, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    return functional.dropout(weights, dropout) @ value


def segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: SegmentAttention,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention of a single packed row, as transformers calls it. ``attention_mask`` is not used."""
    out_LHD = segments.attend(
        query[0], key[0], value[0], scale=scaling, window=sliding_window, softcap=softcap, dropout=dropout
    )
    return out_LHD[None], None


def arguments(model: Any, batch: TokenBatch) -> dict[str, Any]:
    """What a decoder's forward needs, beside ids and positions, to attend a packed micro-batch.

    FlashAttention takes the boundaries, unless a prompt is shared. All else takes segments.
    """
    assert batch.prefix_S is not None
    config, device = model.config.get_text_config(), batch.input_ids_L.device
    if config._attn_implementation.startswith("flash_attention") and not bool((batch.prefix_S >= 0).any()):
        boundaries_S1 = batch.boundaries_S1.to(torch.int32)
        longest = int(boundaries_S1.diff().max())
        return {
            "cu_seq_lens_q": boundaries_S1,
            "cu_seq_lens_k": boundaries_S1,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    # A mask of four axes keeps the model from making another. Attention uses the segments instead.
    no_mask = torch.zeros(1, 1, 1, 1, device=device)
    return {"attention_mask": no_mask, "segments": SegmentAttention(batch, config.hidden_size)}


def enable(model: Any) -> None:
    """Let the model's attention accept ``segments``. Calls without them attend as before.

    Each attention module switches its implementation for the time of its own call, so that gradient checkpointing,
    which calls it again in the backward, attends the same way.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, segment_attention)
    usual = model.config.get_text_config()._attn_implementation

    def switch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if "segments" in kwargs:
            module.config._attn_implementation = _NAME

    def switch_back(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if "segments" in kwargs:
            module.config._attn_implementation = usual

    for module in model.get_decoder().modules():
        if hasattr(module, "layer_idx") and hasattr(module, "config"):
            module.register_forward_pre_hook(switch, with_kwargs=True)
            module.register_forward_hook(switch_back, with_kwargs=True, always_call=True)
