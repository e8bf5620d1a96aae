"""Vocabulary blocks in plain torch, for a CPU and any GPU: [N, V] is never held, and dW is written once.

Forward and backward both sweep the vocabulary. The backward recomputes the logits, so that there are four products
(8NDV) where the naive path has three (6NDV) and keeps 3 to 4 copies of [N, V].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rltrain.kernels.head import Gradients, Head, Scratch, Upstream, block_columns, logits_, partial, targets_within
from rltrain.kernels.online import Partial, merge


def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    collision: bool = False,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :func:`rltrain.kernels.token_logprobs`."""
    return _Blocked.apply(hidden_ND, weight_VD, bias_V, targets_N, temperature, softcap, entropy, collision)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        temperature: float,
        softcap: float | None,
        entropy: bool,
        collision: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        head = Head(weight_VD=weight_VD, bias_V=bias_V, temperature=temperature, softcap=softcap)
        rows = len(hidden_ND)
        scratch = Scratch(head, rows * block_columns(rows), spare=entropy)
        target_logits_N = hidden_ND.new_empty(rows, dtype=head.dtype)
        total = Partial.identity(target_logits_N, entropy=entropy, collision=collision)
        for block in head.blocks(block_columns(rows)):
            logits_KNc = logits_(head, hidden_ND, block, scratch)
            piece, row, column = targets_within(targets_N, block, logits_KNc.shape[-1])
            target_logits_N[row] = logits_KNc[piece, row, column]
            spare_KNc = scratch.spare(logits_KNc.shape)
            total = merge(total, partial(logits_KNc, spare_KNc, entropy=entropy, collision=collision))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, *total[:3])
        ctx.scalars = (temperature, softcap)
        collision_N = total.collision_N
        if collision_N is not None:
            ctx.mark_non_differentiable(collision_N)
        return total.logprobs_N(target_logits_N), total.entropy_N, collision_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor | None, entropy_grad_N: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_ND, weight_VD, bias_V, targets_N, *statistics = ctx.saved_tensors
        temperature, softcap = ctx.scalars
        head = Head(weight_VD=weight_VD, bias_V=bias_V, temperature=temperature, softcap=softcap)
        rows = slice(0, len(hidden_ND))
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        gradients = Gradients(head, hidden_ND, hidden=wants_hidden, weight=wants_weight, bias=wants_bias)
        grad_N = torch.zeros_like(statistics[0]) if grad_N is None else grad_N
        upstream = Upstream(Partial(*statistics), grad_N, entropy_grad_N)
        scratch = Scratch(head, rows.stop * block_columns(rows.stop), spare=False)
        for block in head.blocks(block_columns(rows.stop)):
            logits_KNc = logits_(head, hidden_ND, block, scratch)
            slope_KNc = head.softcap_slope(logits_KNc, block)
            dlogits_KNc = upstream.dlogits_(logits_KNc, targets_N, block)
            gradients.add_(dlogits_KNc, slope_KNc, hidden_ND, rows, block, scratch.narrow(logits_KNc.shape))
        return gradients.hidden_ND, gradients.weight_VD, gradients.bias_V, None, None, None, None, None
