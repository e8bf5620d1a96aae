"""The output head of the block-wise backends: logits of a vocabulary block, and gradients through them.

The columns of a block are split into K pieces, [K, N, c], whose products are a batch of K. With few rows this is
faster, because each thread computes a product of its piece instead of sharing a product with other threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rltrain.kernels.online import Partial

BLOCK_ELEMENTS = 2**20
"""Logits of a block, up to 1024 rows: 4 MB in fp32, which stays in a last-level cache between the passes."""

PIECES = (4, 2, 1)
MOST_SPLIT_ROWS = 2048
"""The most pieces times rows of a block in fp32 on a CPU. On two cores, four pieces take 2/3 to 4/5 of the time with 64
to 256 rows, but 6/5 with 4096."""

LEAST_COLUMNS = 1024
"""The fewest columns of a block: below, products of many rows are slower."""

LOG2_E = 1 / math.log(2)

MASKED = -1e30
"""Replaces a logit of -inf: e^z is still 0, and 0·z is 0 in the entropy."""


def block_columns(rows: int) -> int:
    """Vocabulary entries per block: wide enough for the GEMM at many rows, narrow enough for the cache at few."""
    return min(8192, max(LEAST_COLUMNS, BLOCK_ELEMENTS // max(rows, 1) // 64 * 64))


@dataclass(frozen=True, kw_only=True)
class Head:
    """``z = (cap(h Wᵀ) + b) / T`` with ``cap(u) = c·tanh(u/c)``. Arithmetic on z is in fp32 (fp64 for fp64 weights)."""

    weight_VD: Tensor
    bias_V: Tensor | None
    temperature: float
    softcap: float | None

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the epilogue, which may exceed that of the weights."""
        return torch.promote_types(self.weight_VD.dtype, torch.float32)

    @property
    def is_wide(self) -> bool:
        """Whether the weights have the epilogue's precision."""
        return self.weight_VD.dtype == self.dtype

    def blocks(self, columns: int) -> Iterator[slice]:
        """Slices of the vocabulary, in order. The last may be shorter, so that no mask is needed."""
        vocabulary = self.weight_VD.shape[0]
        return (slice(start, min(start + columns, vocabulary)) for start in range(0, vocabulary, columns))

    def tile(self, rows: int, block: slice) -> tuple[int, int, int]:
        """The shape [K, N, c] of a block."""
        columns = block.stop - block.start
        pieces = next(count for count in PIECES if count * rows <= MOST_SPLIT_ROWS or count == 1)
        split = self.weight_VD.device.type == "cpu" and self.is_wide and columns % pieces == 0
        return (pieces, rows, columns // pieces) if split else (1, rows, columns)

    def weight_KcD(self, block: slice, pieces: int) -> Tensor:
        """The weights of a block."""
        return self.weight_VD[block].unflatten(0, (pieces, -1))

    def epilogue_(self, products_KNc: Tensor, block: slice) -> Tensor:
        """Turn products into logits in place."""
        if self.softcap is not None:
            products_KNc.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.bias_V is not None:
            products_KNc.add_(self.bias_V[block].view(len(products_KNc), 1, -1))
        if self.temperature != 1:
            products_KNc.div_(self.temperature)
        return products_KNc if self.bias_V is None else products_KNc.clamp_(min=MASKED)

    def softcap_slope(self, logits_KNc: Tensor, block: slice) -> Tensor | None:
        """``cap'(u) = 1 - (cap(u)/c)²`` recovered from the logits, None without a cap."""
        if self.softcap is None:
            return None
        capped_KNc = logits_KNc * self.temperature
        if self.bias_V is not None:
            capped_KNc.sub_(self.bias_V[block].view(len(logits_KNc), 1, -1)).nan_to_num_(posinf=0.0)
        return capped_KNc.div_(self.softcap).square_().neg_().add_(1)


class Scratch:
    """Flat buffers that all blocks reuse, because new memory for each block would cost page faults."""

    def __init__(self, head: Head, elements: int, *, spare: bool) -> None:
        self._wide = head.weight_VD.new_empty(elements, dtype=head.dtype)
        self._narrow = self._wide if head.is_wide else head.weight_VD.new_empty(elements)
        self._spare = torch.empty_like(self._wide) if spare else self._wide

    def wide(self, shape: Sequence[int]) -> Tensor:
        """A buffer of the epilogue's type."""
        return self._wide[: math.prod(shape)].view(shape)

    def narrow(self, shape: Sequence[int]) -> Tensor:
        """A buffer of the weights' type: the wide one itself where the types are the same."""
        return self._narrow[: math.prod(shape)].view(shape)

    def spare(self, shape: Sequence[int]) -> Tensor:
        """Another buffer of the epilogue's type: the wide one itself unless there is a spare one."""
        return self._spare[: math.prod(shape)].view(shape)


def logits_(head: Head, hidden_ND: Tensor, block: slice, scratch: Scratch) -> Tensor:
    """Logits of a block, in the scratch's wide buffer."""
    shape = head.tile(len(hidden_ND), block)
    hidden_KND = hidden_ND.expand(shape[0], -1, -1)
    products_KNc = torch.bmm(hidden_KND, head.weight_KcD(block, shape[0]).mT, out=scratch.narrow(shape))
    return head.epilogue_(products_KNc if head.is_wide else scratch.wide(shape).copy_(products_KNc), block)


def exp_(values: Tensor, out: Tensor) -> Tensor:
    """``e^x``. On a CPU torch's exp2 takes a third of the time of its exp, with the same result."""
    if values.device.type == "cpu":
        return torch.mul(values, LOG2_E, out=out).exp2_()
    return torch.exp(values, out=out)


def log_(values: Tensor) -> Tensor:
    """``ln x`` in place, of x >= 0. The log of 0 is that of the smallest positive number."""
    return values.clamp_(min=torch.finfo(values.dtype).tiny).log_()


def partial(logits_KNc: Tensor, out_KNc: Tensor, *, entropy: bool, collision: bool = False) -> Partial:
    """Statistics of one block. ``e^{z-m}`` is left in ``out``, which may be the logits unless entropy is wanted."""
    max_N = logits_KNc.amax(-1).amax(0)
    shifted_KNc = logits_KNc.sub_(max_N[:, None])
    exps_KNc = exp_(shifted_KNc, out_KNc)
    moment_N = shifted_KNc.mul_(exps_KNc).sum(-1).sum(0) if entropy else None
    # A norm makes no square of the block, for which there is no buffer.
    squares_N = torch.linalg.vector_norm(exps_KNc, dim=-1).square().sum(0) if collision else None
    return Partial(max_N, exps_KNc.sum(-1).sum(0), moment_N, squares_N)


def targets_within(targets_N: Tensor, block: slice, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where in [K, N, c] the targets are that lie in the block: piece, row, column."""
    rows = ((targets_N >= block.start) & (targets_N < block.stop)).nonzero().squeeze(1)
    place = targets_N[rows] - block.start
    return place // columns, rows, place % columns


class Upstream(NamedTuple):
    """Inputs of the backward: gradients of the log-probs (``grad_N`` = g) and entropies (``entropy_grad_N`` = e)."""

    statistics: Partial
    grad_N: Tensor
    entropy_grad_N: Tensor | None = None

    def dlogits_(self, logits_KNc: Tensor, targets_N: Tensor, block: slice) -> Tensor:
        """``dL/dz = g·(1[y] - p) - e·p·(log p + H)``, in place of the logits.

        Computed from ``x = z - m`` as ``p = e^x/s`` and ``log p + H = x - t/s``. Near the maximum x is exact, where
        ``z - lse`` has the rounding error of a large lse.
        """
        max_N, sum_N, moment_N, _ = self.statistics
        shifted_KNc = logits_KNc.sub_(max_N[:, None])
        if moment_N is None or self.entropy_grad_N is None:
            dlogits_KNc = exp_(shifted_KNc, shifted_KNc).mul_((self.grad_N / -sum_N)[:, None])
        else:
            factor_KNc = (shifted_KNc - (moment_N / sum_N)[:, None]).mul_((self.entropy_grad_N / -sum_N)[:, None])
            dlogits_KNc = exp_(shifted_KNc, shifted_KNc).mul_(factor_KNc.add_((self.grad_N / -sum_N)[:, None]))
        return self._add_at_targets_(dlogits_KNc, targets_N, block)

    def dlogits_from_exps_(
        self, exps_KNc: Tensor, block_max_N: Tensor, spare_KNc: Tensor, targets_N: Tensor, block: slice
    ) -> Tensor:
        """The same from a block's ``w = e^{z-b}``, b its own maximum: ``p = w·e^{b-m}/s``, ``z - m = ln w + (b - m)``.

        Where w is 0, so is p. ``spare`` is used if entropies have a gradient.
        """
        max_N, sum_N, moment_N, _ = self.statistics
        shift_N = block_max_N - max_N
        scale_N = shift_N.exp() / -sum_N
        if moment_N is None or self.entropy_grad_N is None:
            dlogits_KNc = exps_KNc.mul_((self.grad_N * scale_N)[:, None])
        else:
            e_N = self.entropy_grad_N
            factor_KNc = log_(spare_KNc.copy_(exps_KNc)).mul_((e_N * scale_N)[:, None])
            factor_KNc.add_(((self.grad_N + e_N * (shift_N - moment_N / sum_N)) * scale_N)[:, None])
            dlogits_KNc = exps_KNc.mul_(factor_KNc)
        return self._add_at_targets_(dlogits_KNc, targets_N, block)

    def _add_at_targets_(self, dlogits_KNc: Tensor, targets_N: Tensor, block: slice) -> Tensor:
        piece, rows, column = targets_within(targets_N, block, dlogits_KNc.shape[-1])
        dlogits_KNc[piece, rows, column] += self.grad_N[rows]
        return dlogits_KNc


class Gradients:
    """dh, dW and db of a head, summed over blocks and row chunks. Those not needed are None."""

    def __init__(self, head: Head, hidden_ND: Tensor, *, hidden: bool, weight: bool, bias: bool) -> None:
        self._head = head
        self._hidden_ND = torch.zeros_like(hidden_ND, dtype=head.dtype) if hidden else None
        self.weight_VD = torch.empty_like(head.weight_VD, memory_format=torch.contiguous_format) if weight else None
        self._bias_V = torch.zeros(len(head.weight_VD), dtype=head.dtype, device=hidden_ND.device) if bias else None

    @property
    def hidden_ND(self) -> Tensor | None:
        """dh, rounded a single time."""
        return None if self._hidden_ND is None else self._hidden_ND.to(self._head.weight_VD.dtype)

    @property
    def bias_V(self) -> Tensor | None:
        """db, rounded a single time."""
        if self._bias_V is None or self._head.bias_V is None:
            return None
        return self._bias_V.to(self._head.bias_V.dtype)

    def add_(
        self,
        dlogits_KNc: Tensor,
        slope_KNc: Tensor | None,
        hidden_ND: Tensor,
        rows: slice,
        block: slice,
        narrow_KNc: Tensor,
    ) -> None:
        """Add the dlogits of a block and some rows, which are overwritten. ``narrow_KNc`` takes them rounded."""
        head = self._head
        if head.temperature != 1:
            dlogits_KNc.div_(head.temperature)
        self.add_bias_(dlogits_KNc, block)
        if slope_KNc is not None:
            dlogits_KNc.mul_(slope_KNc)
        self.add_products_(dlogits_KNc if head.is_wide else narrow_KNc.copy_(dlogits_KNc), hidden_ND, rows, block)

    def add_bias_(self, dbias_KNc: Tensor, block: slice) -> None:
        """db of a block is the sum over rows."""
        if self._bias_V is not None:
            self._bias_V[block] += dbias_KNc.sum(1).flatten()

    def add_products_(self, dproducts_KNc: Tensor, hidden_ND: Tensor, rows: slice, block: slice) -> None:
        """The two GEMMs. The first rows write dW of a block, later ones add to it."""
        if self.weight_VD is not None:
            hidden_KND = hidden_ND.expand(len(dproducts_KNc), -1, -1)
            out_KcD = self.weight_VD[block].view(len(dproducts_KNc), -1, hidden_ND.shape[1])
            if rows.start == 0:
                torch.bmm(dproducts_KNc.mT, hidden_KND, out=out_KcD)
            else:
                torch.baddbmm(out_KcD, dproducts_KNc.mT, hidden_KND, out=out_KcD)
        if self._hidden_ND is not None:
            parts_KND = torch.bmm(dproducts_KNc, self._head.weight_KcD(block, len(dproducts_KNc)))
            self._hidden_ND[rows] += parts_KND.sum(0, dtype=self._head.dtype)
