"""Which ids of a completion carry loss: those that the model wrote, and that nothing else takes out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rltrain.types import Group, Mean, Metrics

Masks = Sequence[Sequence[Tensor]]  # bool [T], by group and completion; no groups at all: every id carries loss


def loss_masks(groups: Sequence[Group], filters: Masks = (), *, mask_truncated: bool = False) -> Masks:
    """Where a completion's ids carry loss, ``()`` where all of them do.

    They do not where an environment wrote them, where the estimator's ``filters`` (``Advantages.masks``) are False, and
    with ``mask_truncated`` (DAPO's overlong filtering, 2503.14476) in completions that were cut at the limit.
    """
    completions = [one for group in groups for one in group.completions]
    truncated = mask_truncated and any(one.finish == "length" for one in completions)
    if not filters and not truncated and not any(one.turns for one in completions):
        return ()
    masks = [[torch.tensor(one.written_T, dtype=torch.bool) for one in group.completions] for group in groups]
    if filters:
        masks = [[a & b for a, b in zip(*rows, strict=True)] for rows in zip(masks, filters, strict=True)]
    if not mask_truncated:
        return masks
    return [
        [mask_T & (one.finish != "length") for mask_T, one in zip(rows, group.completions, strict=True)]
        for rows, group in zip(masks, groups, strict=True)
    ]


def truncated_metrics(groups: Sequence[Group]) -> Metrics:
    """``loss/truncated_ratio``: share of the completions whose loss ``loss.mask_truncated`` takes out."""
    cut = [completion.finish == "length" for group in groups for completion in group.completions]
    return {"loss/truncated_ratio": Mean.of(cut)}
