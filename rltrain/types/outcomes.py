"""What estimators and rewards return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rltrain.types.completions import Notes
from rltrain.types.metrics import Metrics

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """One value per completion token: ``values[p][g]`` has shape ``[T]`` of completion g of group p.

    Values at ids that an environment wrote are ignored, and 0 after the check. ``masks[p][g]``, bool ``[T]``, takes the
    tokens where it is False out of the loss, its denominators, its KL and its entropy; none at all takes out nothing.
    ``notes[p]`` says how group p came by its values, for the samples that a run keeps; none at all is fine.
    """

    values: Sequence[Sequence[Tensor]]
    metrics: Metrics = field(default_factory=dict)
    notes: Sequence[Notes] = ()
    masks: Sequence[Sequence[Tensor]] = ()


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a reward returns: ``scores[p][g]``, None to abstain, its own metrics, and notes as in ``Advantages``;
    ``right[p][g]`` where it knows better than :func:`is_right`, for accuracy and pass@k."""

    scores: Sequence[Sequence[float | None]]
    right: Sequence[Sequence[bool]] = ()
    metrics: Metrics = field(default_factory=dict)
    notes: Sequence[Notes] = ()


def is_right(score: Any, *, above: float = 1 - 1e-9) -> Any:
    """Whether a score (or each of a tensor) says that the answer is right: it exceeds ``above``, 1 less rounding.

    NaN, an abstention, is not right. Where a reward has values between 0 and 1, a metric may count from 0.5 on.
    """
    return score > above
