"""Triton kernels for CUDA: fp32 from the dot product on, and no atomics, so that the same call gives the same bits.

Forward: one program per row block and vocabulary split writes (m, s, t, q, z_y). A second kernel merges the splits
(:mod:`rltrain.kernels.online`). Backward: the logits of a vocabulary block are recomputed into dlogits, then two
GEMMs. Tile sizes are fixed, because autotuning at import needs a driver.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rltrain.kernels.head import MASKED, Gradients, Head

PROGRAMS = 512
"""Target number of forward programs, a few per multiprocessor. Few rows get more splits of the vocabulary."""

BACKWARD_COLUMNS = 8192
MERGE_ROWS = 128


class Tiles(NamedTuple):
    """Rows, vocabulary entries and hidden units per step of a program, and its launch options."""

    N: int
    V: int
    D: int
    warps: int
    stages: int

    @classmethod
    def of(cls, dtype: torch.dtype) -> Tiles:
        """Sizes without a spill on sm_80 and sm_90 where 16 divides D: see scripts/bench/triton_report.py."""
        return cls(32, 64, 16, 4, 2) if dtype == torch.float32 else cls(64, 128, 64, 8, 3)


@triton.jit
def _logits(
    hidden, weight, bias, rows, columns, N, V, D,
    hidden_stride, hidden_unit, weight_stride, weight_unit, softcap, scale,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``z = (cap(h Wᵀ) + b)·scale`` of one tile, and the capped products over c."""
    products = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    row_at = hidden + rows.to(tl.int64)[:, None] * hidden_stride
    column_at = weight + columns.to(tl.int64)[None, :] * weight_stride
    for start in range(0, D, BLOCK_D):
        units = start + tl.arange(0, BLOCK_D)
        left = tl.load(row_at + units[None, :] * hidden_unit, (rows < N)[:, None] & (units < D)[None, :], 0.0)
        right = tl.load(column_at + units[:, None] * weight_unit, (columns < V)[None, :] & (units < D)[:, None], 0.0)
        products = tl.dot(left, right, products, input_precision="ieee")
    capped = products
    if HAS_CAP:
        # tanh(u/c) from a logistic, which saturates instead of overflowing.
        capped = 2 * tl.sigmoid(2 * products / softcap) - 1
        products = capped * softcap
    if HAS_BIAS:
        products += tl.load(bias + columns, columns < V, 0.0).to(tl.float32)[None, :]
        return tl.maximum(products * scale, MASKED), capped
    return products * scale, capped


@triton.jit
def forward_kernel(
    hidden, weight, bias, targets, max_out, sum_out, moment_out, squares_out, target_out,
    N, V, D, hidden_stride, hidden_unit, weight_stride, weight_unit, columns_per_split, softcap, scale,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, COLLISION: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(m, s, t, q, z_y) of BLOCK_N rows over one split of the vocabulary. z_y is -inf if the target is elsewhere."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    target = tl.load(targets + rows, rows < N, -1)
    running_max = tl.full((BLOCK_N,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    moment = tl.zeros((BLOCK_N,), dtype=tl.float32)
    squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    target_logit = tl.full((BLOCK_N,), -float("inf"), dtype=tl.float32)
    first = split * columns_per_split
    for start in range(first, tl.minimum(first + columns_per_split, V), BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        z, _ = _logits(
            hidden, weight, bias, rows, columns, N, V, D,
            hidden_stride, hidden_unit, weight_stride, weight_unit, softcap, scale,
            HAS_BIAS, HAS_CAP, MASKED, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        inside = (columns < V)[None, :]
        z = tl.where(inside, z, -float("inf"))
        hit = target[:, None] == columns[None, :]
        target_logit = tl.maximum(target_logit, tl.max(tl.where(hit, z, -float("inf")), 1))
        new_max = tl.maximum(running_max, tl.max(z, 1))
        # In the first tile total = 0 and running_max = -inf, whose product would be NaN.
        shift = tl.where(total > 0, running_max - new_max, 0.0)
        shifted = z - new_max[:, None]
        weights = tl.exp(shifted)
        if ENTROPY:
            moment = tl.exp(shift) * (moment + shift * total) + tl.sum(tl.where(inside, weights * shifted, 0.0), 1)
        if COLLISION:
            squares = tl.exp(2 * shift) * squares + tl.sum(weights * weights, 1)
        total = tl.exp(shift) * total + tl.sum(weights, 1)
        running_max = new_max
    out = split * N + rows
    tl.store(max_out + out, running_max, rows < N)
    tl.store(sum_out + out, total, rows < N)
    tl.store(target_out + out, target_logit, rows < N)
    if ENTROPY:
        tl.store(moment_out + out, moment, rows < N)
    if COLLISION:
        tl.store(squares_out + out, squares, rows < N)


@triton.jit
def merge_kernel(
    max_in, sum_in, moment_in, squares_in, target_in,
    max_out, sum_out, moment_out, logprob_out, entropy_out, collision_out, N, splits,
    ENTROPY: tl.constexpr, COLLISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Merge the splits of BLOCK_N rows, always in the same order."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    running_max = tl.load(max_in + rows, rows < N, 0.0)
    total = tl.load(sum_in + rows, rows < N, 1.0)
    target_logit = tl.load(target_in + rows, rows < N, 0.0)
    moment = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if ENTROPY:
        moment = tl.load(moment_in + rows, rows < N, 0.0)
    squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if COLLISION:
        squares = tl.load(squares_in + rows, rows < N, 0.0)
    for split in range(1, splits):
        at = split * N + rows
        other_max = tl.load(max_in + at, rows < N, 0.0)
        other_total = tl.load(sum_in + at, rows < N, 0.0)
        target_logit = tl.maximum(target_logit, tl.load(target_in + at, rows < N, 0.0))
        new_max = tl.maximum(running_max, other_max)
        shift = running_max - new_max
        other_shift = other_max - new_max
        if ENTROPY:
            other_moment = tl.load(moment_in + at, rows < N, 0.0)
            moment = tl.exp(shift) * (moment + shift * total)
            moment += tl.exp(other_shift) * (other_moment + other_shift * other_total)
        if COLLISION:
            other_squares = tl.load(squares_in + at, rows < N, 0.0)
            squares = tl.exp(2 * shift) * squares + tl.exp(2 * other_shift) * other_squares
        total = tl.exp(shift) * total + tl.exp(other_shift) * other_total
        running_max = new_max
    tl.store(max_out + rows, running_max, rows < N)
    tl.store(sum_out + rows, total, rows < N)
    tl.store(logprob_out + rows, (target_logit - running_max) - tl.log(total), rows < N)
    if ENTROPY:
        tl.store(moment_out + rows, moment, rows < N)
        tl.store(entropy_out + rows, tl.log(total) - moment / total, rows < N)
    if COLLISION:
        tl.store(collision_out + rows, squares / (total * total), rows < N)


@triton.jit
def dlogits_kernel(
    hidden, weight, bias, targets, max_in, sum_in, moment_in, grad, entropy_grad, dlogits_out, bias_out,
    N, V, D, hidden_stride, hidden_unit, weight_stride, weight_unit, softcap, scale,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, BIAS_GRAD: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``dL/d(h Wᵀ)`` of one tile of a vocabulary block with V columns. Targets count from the block's start.

    ``bias_out`` [row blocks, V] takes this tile's column sums of ``dL/db``.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z, capped = _logits(
        hidden, weight, bias, rows, columns, N, V, D,
        hidden_stride, hidden_unit, weight_stride, weight_unit, softcap, scale,
        HAS_BIAS, HAS_CAP, MASKED, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    target = tl.load(targets + rows, rows < N, -1)
    shifted = z - tl.load(max_in + rows, rows < N, 0.0)[:, None]
    total = tl.load(sum_in + rows, rows < N, 1.0)[:, None]
    g = tl.load(grad + rows, rows < N, 0.0)[:, None]
    factor = g
    if ENTROPY:
        # log p + H = (z - m) - t/s
        moment = tl.load(moment_in + rows, rows < N, 0.0)[:, None]
        factor += tl.load(entropy_grad + rows, rows < N, 0.0)[:, None] * (shifted - moment / total)
    hit = target[:, None] == columns[None, :]
    dlogits = (tl.where(hit, g, 0.0) - tl.exp(shifted) / total * factor) * scale
    inside = (rows < N)[:, None] & (columns < V)[None, :]
    if BIAS_GRAD:
        sums = tl.sum(tl.where(inside, dlogits, 0.0), 0)
        tl.store(bias_out + tl.program_id(0).to(tl.int64) * V + columns, sums, columns < V)
    if HAS_CAP:
        dlogits *= 1 - capped * capped
    out = dlogits_out + rows.to(tl.int64)[:, None] * V + columns[None, :]
    tl.store(out, dlogits.to(dlogits_out.dtype.element_ty), inside)


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
    """See :func:`rltrain.kernels.token_logprobs`. Not for fp64."""
    if hidden_ND.dtype == torch.float64:
        raise ValueError("backend=triton: the kernels compute in fp32; choose backend=blocked for float64")
    return _Triton.apply(hidden_ND, weight_VD, bias_V, targets_N, temperature, softcap, entropy, collision)


def _shared_arguments(head: Head, hidden_ND: Tensor) -> tuple[tuple[Any, ...], tuple[float, float], dict[str, Any]]:
    """The size, scalar and constant arguments that both head kernels take."""
    tiles = Tiles.of(hidden_ND.dtype)
    sizes = (hidden_ND.shape[1], *hidden_ND.stride(), *head.weight_VD.stride())
    constants = {
        "HAS_BIAS": head.bias_V is not None,
        "HAS_CAP": head.softcap is not None,
        "MASKED": MASKED,
        "BLOCK_N": tiles.N,
        "BLOCK_V": tiles.V,
        "BLOCK_D": tiles.D,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    return sizes, (1.0 if head.softcap is None else head.softcap, 1 / head.temperature), constants


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel. Type checkers would read its parameters as those of a plain call."""
    kernel[grid](*arguments, **constants)


class _Triton(torch.autograd.Function):
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
        N, V = len(hidden_ND), len(weight_VD)
        tiles = Tiles.of(hidden_ND.dtype)
        sizes, scalars, constants = _shared_arguments(head, hidden_ND)
        row_blocks = triton.cdiv(max(N, 1), tiles.N)
        columns_per_split = triton.cdiv(triton.cdiv(V, triton.cdiv(PROGRAMS, row_blocks)), tiles.V) * tiles.V
        splits = triton.cdiv(V, columns_per_split)
        statistics = hidden_ND.new_empty(5, splits, N, dtype=torch.float32)
        merged = hidden_ND.new_empty(3, N, dtype=torch.float32)
        logprobs_N, entropy_N, collision_N = hidden_ND.new_empty(3, N, dtype=torch.float32)
        if N:
            _launch(
                forward_kernel, (row_blocks, splits),
                hidden_ND, weight_VD, bias_V, targets_N.contiguous(), *statistics,
                N, V, *sizes, columns_per_split, *scalars,
                ENTROPY=entropy, COLLISION=collision, **constants,
            )  # fmt: skip
            _launch(
                merge_kernel, (triton.cdiv(N, MERGE_ROWS),),
                *statistics, *merged, logprobs_N, entropy_N, collision_N, N, splits,
                ENTROPY=entropy, COLLISION=collision, BLOCK_N=MERGE_ROWS,
            )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, merged)
        ctx.scalars = (temperature, softcap)
        ctx.mark_non_differentiable(collision_N)
        return logprobs_N, entropy_N if entropy else None, collision_N if collision else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor | None, entropy_grad_N: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_ND, weight_VD, bias_V, targets_N, merged = ctx.saved_tensors
        temperature, softcap = ctx.scalars
        head = Head(weight_VD=weight_VD, bias_V=bias_V, temperature=temperature, softcap=softcap)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        gradients = Gradients(head, hidden_ND, hidden=wants_hidden, weight=wants_weight, bias=wants_bias)
        grad_N = torch.zeros_like(merged[0]) if grad_N is None else grad_N.contiguous()
        N, tiles = len(hidden_ND), Tiles.of(hidden_ND.dtype)
        row_blocks = triton.cdiv(N, tiles.N)
        sizes, scalars, constants = _shared_arguments(head, hidden_ND)
        for block in head.blocks(BACKWARD_COLUMNS):
            columns = block.stop - block.start
            dlogits_Nv = hidden_ND.new_empty(N, columns)
            bias_sums = merged.new_empty(row_blocks, columns) if wants_bias else None
            if N:
                _launch(
                    dlogits_kernel, (row_blocks, triton.cdiv(columns, tiles.V)),
                    hidden_ND, weight_VD[block], None if bias_V is None else bias_V[block], targets_N - block.start,
                    *merged, grad_N, None if entropy_grad_N is None else entropy_grad_N.contiguous(),
                    dlogits_Nv, bias_sums, N, columns, *sizes, *scalars,
                    ENTROPY=entropy_grad_N is not None, BIAS_GRAD=wants_bias, **constants,
                )  # fmt: skip
            if bias_sums is not None:
                gradients.add_bias_(bias_sums[None], block)
            gradients.add_products_(dlogits_Nv[None], hidden_ND, slice(0, N), block)
        return gradients.hidden_ND, gradients.weight_VD, gradients.bias_V, None, None, None, None, None
