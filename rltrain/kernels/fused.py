"""A token-separable loss whose gradient is made in the forward: three products (6NDV) instead of four.

Rows are processed in chunks. The exponentials [n, V] of a chunk's logits are kept from the sweep that computes its
log-probs to the sweep that computes dlogits, so that nothing is computed twice. They are the extra memory, of at most
512 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rltrain.kernels.head import Gradients, Head, Scratch, Upstream, logits_, partial, targets_within
from rltrain.kernels.online import Partial, merge

TokenLoss = Callable[[Tensor, Tensor | None, slice], Tensor]

BLOCK_COLUMNS = 4096
MIN_CHUNK_ROWS = 128
MAX_CHUNK_ROWS = 512


class FusedLoss(NamedTuple):
    """``loss`` is the sum over tokens and carries the gradient. The others are values for metrics."""

    loss: Tensor
    logprobs_N: Tensor
    entropy_N: Tensor | None
    collision_N: Tensor | None = None


def chunk_rows(head: Head, rows: int) -> int:
    """Rows of a chunk: a quarter of all, at least 128, doubled in 16 bits, at most 512, a multiple of 16 for the GEMMs.

    Each chunk reads W twice and adds to the whole of dW, and products of fewer rows are slower. More rows need more
    memory for what a chunk keeps.
    """
    share = -(-rows // 64) * 16
    return max(16, min(MAX_CHUNK_ROWS, -(-rows // 16) * 16, max(MIN_CHUNK_ROWS, share) * (1 if head.is_wide else 2)))


def fused_token_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    token_loss: TokenLoss,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    collision: bool = False,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> FusedLoss:
    """See :func:`rltrain.kernels.fused_token_loss`."""
    if not torch.is_grad_enabled():
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    return FusedLoss(
        *_Fused.apply(hidden_ND, weight_VD, bias_V, targets_N, token_loss, temperature, softcap, entropy, collision)
    )


class _Chunk:
    """Data of some rows between the sweeps: a contiguous tile per vocabulary block, in the weights' precision.

    A tile holds ``w = e^{z-b}``, b a row's maximum in the block, of which dlogits are multiples. With a soft cap it
    holds the logits, which the slope of the cap needs.
    """

    def __init__(self, head: Head, rows: int, *, entropy: bool, collision: bool) -> None:
        self._head, self._entropy, self._collision = head, entropy, collision
        self._tiles = head.weight_VD.new_empty(rows * len(head.weight_VD))
        self._scratch = Scratch(head, rows * min(BLOCK_COLUMNS, len(head.weight_VD)), spare=entropy)
        self._max_n: dict[int, Tensor] = {}  # by the start of a block

    def _tile(self, rows: int, block: slice) -> Tensor:
        return self._tiles[rows * block.start : rows * block.stop].view(self._head.tile(rows, block))

    def fill(self, hidden_nD: Tensor, targets_n: Tensor) -> tuple[Tensor, Partial]:
        """First sweep: make the tiles. Returns target logits and statistics of the rows."""
        head = self._head
        target_logits_n = hidden_nD.new_empty(len(hidden_nD), dtype=head.dtype)
        total = Partial.identity(target_logits_n, entropy=self._entropy, collision=self._collision)
        for block in head.blocks(BLOCK_COLUMNS):
            logits_Knc = logits_(head, hidden_nD, block, self._scratch)
            tile_Knc, spare_Knc = self._tile(len(hidden_nD), block), self._scratch.spare(logits_Knc.shape)
            piece, row, column = targets_within(targets_n, block, logits_Knc.shape[-1])
            target_logits_n[row] = logits_Knc[piece, row, column]
            keeps_logits = head.softcap is not None
            exps_Knc = tile_Knc if head.is_wide and not keeps_logits else spare_Knc
            if keeps_logits:
                tile_Knc.copy_(logits_Knc)
            statistics = partial(logits_Knc, exps_Knc, entropy=self._entropy, collision=self._collision)
            if not keeps_logits and not head.is_wide:
                tile_Knc.copy_(exps_Knc)
            self._max_n[block.start] = statistics.max_N
            total = merge(total, statistics)
        return target_logits_n, total

    def dlogits(self, upstream: Upstream, targets_n: Tensor, block: slice) -> tuple[Tensor, Tensor | None, Tensor]:
        """Second sweep: a block's dlogits, the slope of its soft cap, and its tile, which is free then."""
        tile_Knc = self._tile(len(targets_n), block)
        wide_Knc = tile_Knc if self._head.is_wide else self._scratch.wide(tile_Knc.shape).copy_(tile_Knc)
        if self._head.softcap is not None:
            slope_Knc = self._head.softcap_slope(wide_Knc, block)
            return upstream.dlogits_(wide_Knc, targets_n, block), slope_Knc, tile_Knc
        spare_Knc, max_n = self._scratch.spare(tile_Knc.shape), self._max_n[block.start]
        return upstream.dlogits_from_exps_(wide_Knc, max_n, spare_Knc, targets_n, block), None, tile_Knc


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        token_loss: TokenLoss,
        temperature: float,
        softcap: float | None,
        entropy: bool,
        collision: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        head = Head(weight_VD=weight_VD, bias_V=bias_V, temperature=temperature, softcap=softcap)
        total_rows = len(hidden_ND)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        gradients = Gradients(head, hidden_ND, hidden=wants_hidden, weight=wants_weight, bias=wants_bias)
        most_rows = chunk_rows(head, total_rows)
        chunk = _Chunk(head, most_rows, entropy=entropy, collision=collision)
        loss = hidden_ND.new_zeros((), dtype=head.dtype)
        logprobs_N = hidden_ND.new_empty(total_rows, dtype=head.dtype)
        entropy_N = torch.empty_like(logprobs_N) if entropy else None
        collision_N = torch.empty_like(logprobs_N) if collision else None
        # With N = 0 there is one empty chunk, which writes the zeros of dW.
        for start in range(0, max(total_rows, 1), most_rows):
            rows = slice(start, min(start + most_rows, total_rows))
            hidden_nD, targets_n = hidden_ND[rows], targets_N[rows]
            target_logits_n, statistics = chunk.fill(hidden_nD, targets_n)
            logprobs_N[rows] = statistics.logprobs_N(target_logits_n)
            if entropy_N is not None and statistics.entropy_N is not None:
                entropy_N[rows] = statistics.entropy_N
            if collision_N is not None and statistics.collision_N is not None:
                collision_N[rows] = statistics.collision_N
            chunk_loss, upstream = _differentiate(token_loss, logprobs_N, entropy_N, statistics, rows)
            loss += chunk_loss
            if any(ctx.needs_input_grad):
                for block in head.blocks(BLOCK_COLUMNS):
                    dlogits_Knc, slope_Knc, tile_Knc = chunk.dlogits(upstream, targets_n, block)
                    gradients.add_(dlogits_Knc, slope_Knc, hidden_nD, rows, block, tile_Knc)
        ctx.gradients = (gradients.hidden_ND, gradients.weight_VD, gradients.bias_V)
        values = (logprobs_N, entropy_N, collision_N)
        ctx.mark_non_differentiable(*(value for value in values if value is not None))
        return loss, *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("fused_token_loss: its gradients were handed over already; call backward once")
        # Handed over, not kept, so that they are scaled in place and dW exists once.
        gradients, ctx.gradients = ctx.gradients, None
        if grad.device.type != "cpu" or grad != 1:
            gradients = tuple(None if gradient is None else gradient.mul_(grad) for gradient in gradients)
        return (*gradients, None, None, None, None, None, None)


def _differentiate(
    token_loss: TokenLoss, logprobs_N: Tensor, entropy_N: Tensor | None, statistics: Partial, rows: slice
) -> tuple[Tensor, Upstream]:
    """The loss of some rows, and its derivatives by their log-probs and entropies."""
    logprobs_n = logprobs_N[rows].detach().requires_grad_()
    entropy_n = None if entropy_N is None else entropy_N[rows].detach().requires_grad_()
    leaves = [logprobs_n] if entropy_n is None else [logprobs_n, entropy_n]
    with torch.enable_grad():
        loss = token_loss(logprobs_n, entropy_n, rows).sum()
        grad_n, *entropy_grad_n = torch.autograd.grad(loss, leaves, allow_unused=True)
    grad_n = torch.zeros_like(logprobs_n) if grad_n is None else grad_n
    return loss.detach(), Upstream(statistics, grad_n, entropy_grad_n[0] if entropy_grad_n else None)
