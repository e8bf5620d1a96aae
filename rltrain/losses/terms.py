"""The record that a loss returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """What a loss gives: its per-token term, to be minimised, and what is measured of each token, without gradient.

    Weights, importance correction, KL and entropy are added by :mod:`rltrain.loss`. A metric is the mean of its values
    over the tokens that carry loss.
    """

    loss_N: Tensor
    metrics_N: Mapping[str, Tensor] = field(default_factory=dict)
