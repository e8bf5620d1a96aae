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


def whiten_kept(
    values: Sequence[Sequence[Tensor]], kept: Sequence[Sequence[bool]], *, eps: float, name: str
) -> list[list[Tensor]]:
    """:func:`whiten` of the rows ``values[p][g]`` that are kept; the others are in no statistic and become zeros."""
    pairs = [pair for group, flags in zip(values, kept, strict=True) for pair in zip(group, flags, strict=True)]
    whitened = iter(whiten([row_T for row_T, keep in pairs if keep], eps=eps, name=name))
    return [
        [next(whitened) if keep else torch.zeros_like(row_T).double() for row_T, keep in zip(group, flags, strict=True)]
        for group, flags in zip(values, kept, strict=True)
    ]
