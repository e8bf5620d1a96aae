"""Attention behind a prefix as two calls without a mask, merged by their log-sum-exp.

    out = e^(l_1 - l)·out_1 + e^(l_2 - l)·out_2,    l = log(e^l_1 + e^l_2)

Piece 1 is the prefix, of which every query sees all keys. Piece 2 is the row itself, under the causal mask. torch's
flash kernel takes no other mask, and returns l_i (Dao 2023, 2307.08691).

The backward of each piece is the kernel's own, given the merged ``out`` and ``l``: with P = e^(S - l) the gradient of
its scores is P·(dO·V^T - rowsum(dO·out)), as in ring attention (Liu et al. 2023, 2310.01889).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ATEN = torch.ops.aten
_HEAD_MULTIPLE = 8  # of the kernel; scaled_dot_product_attention pads other sizes


def takes_flash(query: Tensor, key: Tensor) -> bool:
    """Whether torch's flash kernel on CUDA takes these heads, [B, H, T, D]: 16 bits, D a multiple of 8 up to 256."""
    if not query.is_cuda:
        return False
    from torch.backends.cuda import SDPAParams, can_use_flash_attention

    grouped = query.shape[1] != key.shape[1]
    parameters = SDPAParams(query, key, key, None, 0.0, False, grouped)
    return query.shape[-1] % _HEAD_MULTIPLE == 0 and can_use_flash_attention(parameters)


def _forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor, list[Any]]:
    """Output [B, H, Q, D], log-sum-exp [B, H, Q] in fp32 or wider, and what the kernel's backward needs beside them."""
    if not query.is_cuda:
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
        return out, lse, []
    out, lse, *rest = _ATEN._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
    return out, lse, rest[:6]


def _backward(grad: Tensor, piece: tuple[Any, ...], out: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, ...]:
    query, key, value, causal, rest = piece
    if not query.is_cuda:
        kernel = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(grad, query, key, value, out, lse, 0.0, causal, scale=scale)
    sequences, seeds = rest[:4], rest[4:]
    kernel = _ATEN._scaled_dot_product_flash_attention_backward
    return kernel(grad, query, key, value, out, lse, *sequences, 0.0, causal, *seeds, scale=scale)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, prefix_key: Tensor, prefix_value: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        first, lse_1, ctx.rest_1 = _forward(query, prefix_key, prefix_value, False, scale)
        second, lse_2, ctx.rest_2 = _forward(query, key, value, True, scale)
        lse = torch.logaddexp(lse_1, lse_2)
        merged = first * (lse_1 - lse).exp().unsqueeze(-1) + second * (lse_2 - lse).exp().unsqueeze(-1)
        out = merged.to(query.dtype)
        ctx.scale = scale
        ctx.save_for_backward(query, prefix_key, prefix_value, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, prefix_key, prefix_value, key, value, out, lse = ctx.saved_tensors
        pieces = [(query, prefix_key, prefix_value, False, ctx.rest_1), (query, key, value, True, ctx.rest_2)]
        first, second = (_backward(grad, piece, out, lse, ctx.scale) for piece in pieces)
        return first[0] + second[0], *first[1:], *second[1:], None


def merged_attention(query: Tensor, key: Tensor, value: Tensor, *, prefix: int, scale: float | None) -> Tensor:
    """[B, H, Q, D]: query i over the first ``prefix`` keys and the i + 1 after them; keys [B, H_kv, prefix + Q, D].

    ``scale`` is D^-0.5 where it is None.
    """
    pieces = (part for x in (key, value) for part in (x[:, :, :prefix], x[:, :, prefix:]))
    prefix_key, own_key, prefix_value, own_value = pieces
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _Merged.apply(query, prefix_key, prefix_value, own_key, own_value, scale)  # type: ignore[assignment]
    return out
