"""The output head as the block-wise paths see it: logits of a vocabulary block, and what flows back from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rltrain.kernels.online import Partial

BLOCK_ELEMENTS = 2**20
"""Logits worked on at a time: 4 MB in fp32, which stays in a last-level cache between the passes over it."""

LOG2_E = 1 / math.log(2)

MASKED = -1e30
"""Stands for a logit of -inf: its e^z is 0 all the same, and 0·z stays 0 in the entropy."""


def block_columns(rows: int) -> int:
    """Vocabulary entries per block: wide enough for the GEMM at many rows, narrow enough for the cache at few."""
    return min(8192, max(512, BLOCK_ELEMENTS // max(rows, 1) // 64 * 64))


@dataclass(frozen=True, kw_only=True)
class Head:
    """``z = (cap(h Wᵀ) + b) / T`` with ``cap(u) = c·tanh(u/c)``. Arithmetic on z is in fp32 (fp64 for fp64 weights)."""

    weight_VD: Tensor
    bias_V: Tensor | None
    temperature: float
    softcap: float | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the epilogue, not of the weights."""
        return torch.promote_types(self.weight_VD.dtype, torch.float32)

    @property
    def is_wide(self) -> bool:
        """The weights already have the epilogue's precision."""
        return self.weight_VD.dtype == self.dtype

    def blocks(self, columns: int) -> Iterator[slice]:
        """Slices of the vocabulary, in order; the last may be short, so no tail ever needs a mask."""
        vocabulary = self.weight_VD.shape[0]
        return (slice(start, min(start + columns, vocabulary)) for start in range(0, vocabulary, columns))

    def epilogue_(self, products_Nv: Tensor, block: slice) -> Tensor:
        """Turn products into logits in place."""
        if self.softcap is not None:
            products_Nv.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.bias_V is not None:
            products_Nv.add_(self.bias_V[block])
        if self.temperature != 1:
            products_Nv.div_(self.temperature)
        return products_Nv if self.bias_V is None else products_Nv.clamp_(min=MASKED)

    def softcap_slope(self, logits_Nv: Tensor, block: slice) -> Tensor | None:
        """``cap'(u) = 1 - (cap(u)/c)²`` recovered from the logits; None without a cap."""
        if self.softcap is None:
            return None
        capped_Nv = logits_Nv * self.temperature
        if self.bias_V is not None:
            capped_Nv.sub_(self.bias_V[block]).nan_to_num_(posinf=0.0)
        return capped_Nv.div_(self.softcap).square_().neg_().add_(1)


class Scratch:
    """Flat buffers that every block reuses; fresh memory for each would cost page faults."""

    def __init__(self, head: Head, rows: int, columns: int) -> None:
        self._wide = head.weight_VD.new_empty(rows * columns, dtype=head.dtype)
        self._narrow = self._wide if head.is_wide else head.weight_VD.new_empty(rows * columns)

    def wide(self, rows: int, columns: int) -> Tensor:
        """A [rows, columns] buffer of the epilogue's type."""
        return self._wide[: rows * columns].view(rows, columns)

    def narrow(self, rows: int, columns: int) -> Tensor:
        """A [rows, columns] buffer of the weights' type: the wide one itself where the types are the same."""
        return self._narrow[: rows * columns].view(rows, columns)


def logits_(head: Head, hidden_ND: Tensor, block: slice, scratch: Scratch) -> Tensor:
    """Logits of a block, in the scratch's wide buffer."""
    shape = (hidden_ND.shape[0], block.stop - block.start)
    products_Nv = torch.mm(hidden_ND, head.weight_VD[block].T, out=scratch.narrow(*shape))
    return head.epilogue_(products_Nv if head.is_wide else scratch.wide(*shape).copy_(products_Nv), block)


def exp_(values: Tensor) -> Tensor:
    """``e^x`` in place. On a CPU torch's exp2 takes a third of the time of its exp, to the same last bit."""
    return values.mul_(LOG2_E).exp2_() if values.device.type == "cpu" else values.exp_()


def partial(logits_Nv: Tensor, out_Nv: Tensor, *, entropy: bool) -> Partial:
    """Statistics of one block; ``out_Nv`` is scratch and may be the logits themselves."""
    max_N = logits_Nv.amax(1)
    shifted_Nv = torch.sub(logits_Nv, max_N[:, None], out=out_Nv)
    if not entropy:
        return Partial(max_N, exp_(shifted_Nv).sum(1), None)
    weights_Nv = exp_(shifted_Nv.clone())
    sum_N = weights_Nv.sum(1)
    return Partial(max_N, sum_N, weights_Nv.mul_(shifted_Nv).sum(1))


def targets_within(targets_N: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Rows whose target lies in the block, and its column there."""
    rows = ((targets_N >= block.start) & (targets_N < block.stop)).nonzero().squeeze(1)
    return rows, targets_N[rows] - block.start


class Upstream(NamedTuple):
    """What the backward of the log-probs (``grad_N`` = g) and entropies (``entropy_grad_N`` = e) starts from."""

    statistics: Partial
    grad_N: Tensor
    entropy_grad_N: Tensor | None = None

    def dlogits_(self, logits_Nv: Tensor, targets_N: Tensor, block: slice) -> Tensor:
        """``dL/dz = g·(1[y] - p) - e·p·(log p + H)``; overwrites the logits.

        Formed from ``x = z - m`` as ``p = e^x/s`` and ``log p + H = x - t/s``: x is exact near the maximum, where
        ``z - lse`` would bring in the rounding of a large lse.
        """
        max_N, sum_N, moment_N = self.statistics
        shifted_Nv = logits_Nv.sub_(max_N[:, None])
        if moment_N is None or self.entropy_grad_N is None:
            dlogits_Nv = exp_(shifted_Nv).mul_((self.grad_N / -sum_N)[:, None])
        else:
            factor_Nv = (shifted_Nv - (moment_N / sum_N)[:, None]).mul_((self.entropy_grad_N / -sum_N)[:, None])
            dlogits_Nv = exp_(shifted_Nv).mul_(factor_Nv.add_((self.grad_N / -sum_N)[:, None]))
        rows, columns = targets_within(targets_N, block)
        dlogits_Nv[rows, columns] += self.grad_N[rows]
        return dlogits_Nv


class Gradients:
    """dh, dW and db of a head, added up over blocks and row chunks; only those that are wanted."""

    def __init__(self, head: Head, hidden_ND: Tensor, *, hidden: bool, weight: bool, bias: bool) -> None:
        self._head = head
        self._hidden_ND = torch.zeros_like(hidden_ND, dtype=head.dtype) if hidden else None
        self.weight_VD = torch.empty_like(head.weight_VD, memory_format=torch.contiguous_format) if weight else None
        self._bias_V = torch.zeros(len(head.weight_VD), dtype=head.dtype, device=hidden_ND.device) if bias else None

    @property
    def hidden_ND(self) -> Tensor | None:
        """dh, rounded once."""
        return None if self._hidden_ND is None else self._hidden_ND.to(self._head.weight_VD.dtype)

    @property
    def bias_V(self) -> Tensor | None:
        """db, rounded once."""
        if self._bias_V is None or self._head.bias_V is None:
            return None
        return self._bias_V.to(self._head.bias_V.dtype)

    def add_(
        self,
        dlogits_Nv: Tensor,
        slope_Nv: Tensor | None,
        hidden_ND: Tensor,
        rows: slice,
        block: slice,
        narrow_Nv: Tensor,
    ) -> None:
        """Take in the dlogits of one block and some rows, overwriting them; ``narrow_Nv`` takes them rounded."""
        head = self._head
        if head.temperature != 1:
            dlogits_Nv.div_(head.temperature)
        self.add_bias_(dlogits_Nv, block)
        if slope_Nv is not None:
            dlogits_Nv.mul_(slope_Nv)
        self.add_products_(dlogits_Nv if head.is_wide else narrow_Nv.copy_(dlogits_Nv), hidden_ND, rows, block)

    def add_bias_(self, dbias_Nv: Tensor, block: slice) -> None:
        """db of a block is the sum over rows."""
        if self._bias_V is not None:
            self._bias_V[block] += dbias_Nv.sum(0)

    def add_products_(self, dproducts_Nv: Tensor, hidden_ND: Tensor, rows: slice, block: slice) -> None:
        """The two GEMMs; the first rows write dW of a block, later ones add to it."""
        if self.weight_VD is not None:
            out_vD = self.weight_VD[block]
            if rows.start == 0:
                torch.mm(dproducts_Nv.T, hidden_ND, out=out_vD)
            else:
                torch.addmm(out_vD, dproducts_Nv.T, hidden_ND, out=out_vD)
        if self._hidden_ND is None:
            return
        if self._head.is_wide:
            self._hidden_ND[rows].addmm_(dproducts_Nv, self._head.weight_VD[block])
        else:
            self._hidden_ND[rows] += dproducts_Nv @ self._head.weight_VD[block]
