"""Metrics as records that add up over micro-batches and ranks, and are reduced once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A metric as (sum, count), so that it is averaged once over micro-batches and ranks."""

    total: float
    count: float

    @classmethod
    def of(cls, values: Any) -> Mean:
        """Mean of a number, a sequence of numbers or a tensor."""
        if hasattr(values, "numel"):
            return cls(total=float(values.double().sum()), count=values.numel())
        if isinstance(values, (int, float)):
            return cls(total=float(values), count=1)
        items = [float(value) for value in values]
        return cls(total=sum(items), count=len(items))

    def __add__(self, other: Mean) -> Mean:
        return Mean(total=self.total + other.total, count=self.count + other.count)


@dataclass(frozen=True, kw_only=True)
class Max:
    """A metric reduced by maximum."""

    value: float

    def __add__(self, other: Max) -> Max:
        return Max(value=max(self.value, other.value))


@dataclass(frozen=True, kw_only=True)
class Min:
    """A metric reduced by minimum."""

    value: float

    def __add__(self, other: Min) -> Min:
        return Min(value=min(self.value, other.value))


@dataclass(frozen=True, kw_only=True)
class Sum:
    """A metric summed over micro-batches and ranks, such as a loss whose weights are global."""

    value: float

    def __add__(self, other: Sum) -> Sum:
        return Sum(value=self.value + other.value)


@dataclass(frozen=True, kw_only=True)
class Std:
    """A standard deviation (ddof 1; 0 of one value): count, mean, sum of squared deviations (Chan et al., 1979)."""

    count: float
    mean: float
    squares: float

    @classmethod
    def of(cls, values: Tensor) -> Std:
        """Of all the values of a tensor."""
        if not values.numel():
            return cls(count=0, mean=0.0, squares=0.0)
        mean = values.double().mean()
        squares = (values.double() - mean).square().sum()
        return cls(count=values.numel(), mean=float(mean), squares=float(squares))

    @property
    def value(self) -> float:
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    def __add__(self, other: Std) -> Std:
        count = self.count + other.count
        if not count:
            return self
        shift = other.mean - self.mean
        return Std(
            count=count,
            mean=self.mean + shift * other.count / count,
            squares=self.squares + other.squares + shift**2 * self.count * other.count / count,
        )


Metric = Mean | Max | Min | Sum | Std
Metrics = Mapping[str, Metric]
