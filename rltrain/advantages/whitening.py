"""Whitening over the tokens of the global batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rltrain.runtime import dist


def whiten(rows: Sequence[Tensor], *, eps: float, name: str) -> list[Tensor]:
    """``(A - mean) / (std + eps)``, mean and population std (ddof 0) over the tokens of all rows and ranks, float64.

    Each rank must call this once per batch, with no rows if it has none. All equal gives zeros to rounding (exact if
    they are 0). ``name`` stands in the error of a rank that waits too long.
    """
    flat = torch.cat([torch.empty(0, dtype=torch.float64), *rows])
    sums = dist.all_sum(torch.stack([flat.sum(), torch.tensor(float(len(flat))).double()]), name=f"{name}: token mean")
    count = sums[1].clamp(min=1)
    centred = flat - sums[0] / count
    squares = dist.all_sum(centred.square().sum(), name=f"{name}: token variance")
    return list((centred / ((squares / count).sqrt() + eps)).split([len(row_T) for row_T in rows]))


def whiten_where(
    values: Sequence[Sequence[Tensor]], counted: Sequence[Sequence[Tensor]], *, eps: float, name: str
) -> list[list[Tensor]]:
    """:func:`whiten` of ``values[p][g]`` over the tokens where ``counted[p][g]`` is True; the others become 0."""
    pairs = [pair for rows, masks in zip(values, counted, strict=True) for pair in zip(rows, masks, strict=True)]
    whitened = iter(whiten([row_T[mask_T] for row_T, mask_T in pairs], eps=eps, name=name))
    return [
        [
            torch.zeros(len(row_T), dtype=torch.float64).masked_scatter(mask_T, next(whitened))
            for row_T, mask_T in zip(rows, masks, strict=True)
        ]
        for rows, masks in zip(values, counted, strict=True)
    ]
