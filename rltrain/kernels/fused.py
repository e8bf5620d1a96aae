"""A token-separable loss whose gradient is made in the forward: three products (6NDV) instead of four.

Rows go in chunks. A chunk's logits [n, V] are kept from the sweep that finds its log-probs to the sweep that turns
them into dlogits, so that nothing is computed twice; they are the extra memory, at most half of one [N, V].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rltrain.kernels.head import Gradients, Head, Scratch, Upstream, partial, targets_within
from rltrain.kernels.online import Partial, merge

TokenLoss = Callable[[Tensor, Tensor | None, slice], Tensor]

BLOCK_COLUMNS = 2048
MAX_CHUNK_ROWS = 512


class FusedLoss(NamedTuple):
    """``loss`` is the sum over tokens and carries the gradient; log-probs and entropies are values for metrics."""

    loss: Tensor
    logprobs_N: Tensor
    entropy_N: Tensor | None


def chunk_rows(head: Head, rows: int) -> int:
    """A quarter of the rows, half of them where logits are kept in 16 bits: a twelfth of naive's [N, V] copies or less.

    As few as that allows, since each chunk adds to the whole of dW; in multiples of 16, which GEMMs like.
    """
    share = -(-rows // (4 if head.is_wide else 2))
    return max(16, min(MAX_CHUNK_ROWS, -(-share // 16) * 16))


def fused_token_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    token_loss: TokenLoss,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> FusedLoss:
    """See :func:`rltrain.kernels.fused_token_loss`."""
    loss, logprobs_N, entropy_N = _Fused.apply(
        hidden_ND, weight_VD, bias_V, targets_N, token_loss, temperature, softcap, entropy
    )
    return FusedLoss(loss, logprobs_N, entropy_N)


class _Chunk:
    """The logits of some rows, as one contiguous tile per vocabulary block, in the weights' precision."""

    def __init__(self, head: Head, rows: int) -> None:
        self._head = head
        self._tiles = head.weight_VD.new_empty(rows * len(head.weight_VD))
        self._scratch = Scratch(head, rows, BLOCK_COLUMNS)

    def tile(self, rows: int, block: slice) -> Tensor:
        """Where a block's products are kept."""
        return self._tiles[rows * block.start : rows * block.stop].view(rows, block.stop - block.start)

    def fill(self, hidden_nD: Tensor, targets_n: Tensor, *, entropy: bool) -> tuple[Tensor, Partial]:
        """First sweep: make the tiles; target logits and statistics of the rows."""
        head, rows = self._head, len(hidden_nD)
        target_logits_n = hidden_nD.new_empty(rows, dtype=head.dtype)
        total = Partial.identity(target_logits_n, entropy=entropy)
        for block in head.blocks(BLOCK_COLUMNS):
            torch.mm(hidden_nD, head.weight_VD[block].T, out=self.tile(rows, block))
            logits_nv = self.logits(rows, block)
            found, columns = targets_within(targets_n, block)
            target_logits_n[found] = logits_nv[found, columns]
            total = merge(total, partial(logits_nv, logits_nv, entropy=entropy))
        return target_logits_n, total

    def logits(self, rows: int, block: slice) -> Tensor:
        """A block's logits in the scratch buffer, from its tile."""
        tile_nv = self.tile(rows, block)
        return self._head.epilogue_(self._scratch.wide(*tile_nv.shape).copy_(tile_nv), block)


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
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        head = Head(weight_VD=weight_VD, bias_V=bias_V, temperature=temperature, softcap=softcap)
        total_rows = len(hidden_ND)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        gradients = Gradients(head, hidden_ND, hidden=wants_hidden, weight=wants_weight, bias=wants_bias)
        most_rows = chunk_rows(head, total_rows)
        chunk = _Chunk(head, most_rows)
        loss = hidden_ND.new_zeros((), dtype=head.dtype)
        logprobs_N = hidden_ND.new_empty(total_rows, dtype=head.dtype)
        entropy_N = torch.empty_like(logprobs_N) if entropy else None
        # No rows at all are one empty chunk, which writes the zeros of dW.
        for start in range(0, max(total_rows, 1), most_rows):
            rows = slice(start, min(start + most_rows, total_rows))
            hidden_nD, targets_n = hidden_ND[rows], targets_N[rows]
            target_logits_n, statistics = chunk.fill(hidden_nD, targets_n, entropy=entropy)
            logprobs_N[rows] = statistics.logprobs_N(target_logits_n)
            if entropy_N is not None and statistics.entropy_N is not None:
                entropy_N[rows] = statistics.entropy_N
            chunk_loss, upstream = _differentiate(token_loss, logprobs_N, entropy_N, statistics, rows)
            loss += chunk_loss
            if any(ctx.needs_input_grad):
                for block in head.blocks(BLOCK_COLUMNS):
                    logits_nv = chunk.logits(len(hidden_nD), block)
                    slope_nv = head.softcap_slope(logits_nv, block)
                    dlogits_nv = upstream.dlogits_(logits_nv, targets_n, block)
                    tile_nv = chunk.tile(len(hidden_nD), block)
                    gradients.add_(dlogits_nv, slope_nv, hidden_nD, rows, block, tile_nv)
        ctx.gradients = (gradients.hidden_ND, gradients.weight_VD, gradients.bias_V)
        ctx.mark_non_differentiable(*(values for values in (logprobs_N, entropy_N) if values is not None))
        return loss, logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("fused_token_loss: its gradients were handed over already; call backward once")
        # Given away rather than kept, so that they are scaled in place and dW exists once.
        gradients, ctx.gradients = ctx.gradients, None
        if grad.device.type != "cpu" or grad != 1:
            gradients = tuple(None if gradient is None else gradient.mul_(grad) for gradient in gradients)
        return (*gradients, None, None, None, None, None)


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
