"""Softmax statistics that can be merged, for vocabulary blocks, kernel splits and ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Statistics of some columns of the logits z, over which ``m = max z``.

    ``max_N = m``, ``sum_N = s = Σ e^{z-m}``, ``moment_N = t = Σ e^{z-m}(z-m)`` (None if no entropy is needed),
    ``squares_N = q = Σ e^{2(z-m)}`` (None if no collision probability is needed).
    """

    max_N: Tensor
    sum_N: Tensor
    moment_N: Tensor | None
    squares_N: Tensor | None = None

    @classmethod
    def identity(cls, like_N: Tensor, *, entropy: bool, collision: bool = False) -> Partial:
        """The statistics of an empty set of columns: (-inf, 0, 0, 0)."""
        zeros_N = torch.zeros_like(like_N)
        wanted = (zeros_N if entropy else None, zeros_N if collision else None)
        return cls(torch.full_like(like_N, -torch.inf), zeros_N, *wanted)

    @property
    def lse_N(self) -> Tensor:
        """``log Σ e^z``."""
        return self.max_N + self.sum_N.log()

    def logprobs_N(self, logits_N: Tensor) -> Tensor:
        """Log-probs of single logits. The difference to the maximum is exact, so it comes first."""
        return (logits_N - self.max_N) - self.sum_N.log()

    @property
    def entropy_N(self) -> Tensor | None:
        """``H = log s - t/s`` in nats."""
        return None if self.moment_N is None else self.sum_N.log() - self.moment_N / self.sum_N

    @property
    def collision_N(self) -> Tensor | None:
        """``Σ p² = q/s²``, the probability that two draws agree."""
        return None if self.squares_N is None else self.squares_N / self.sum_N.square()


def merge(a: Partial, b: Partial) -> Partial:
    """Statistics of two disjoint sets of columns taken together. Associative and commutative.

    With ``M = max(m_a, m_b)`` and ``d = m - M``: ``s = Σ e^d s``, ``t = Σ e^d (t + d·s)``, ``q = Σ e^{2d} q``,
    with sums over both sets.
    """
    max_N = torch.maximum(a.max_N, b.max_N)
    # -inf - -inf (two identities) counts as 0, -inf - finite as the lowest finite number, whose exp is 0.
    shift_a, shift_b = ((part.max_N - max_N).nan_to_num(nan=0.0) for part in (a, b))
    scale_a, scale_b = shift_a.exp(), shift_b.exp()
    sum_N = scale_a * a.sum_N + scale_b * b.sum_N
    moment_N = squares_N = None
    if a.moment_N is not None and b.moment_N is not None:
        moment_N = scale_a * (a.moment_N + shift_a * a.sum_N) + scale_b * (b.moment_N + shift_b * b.sum_N)
    if a.squares_N is not None and b.squares_N is not None:
        squares_N = scale_a.square() * a.squares_N + scale_b.square() * b.squares_N
    return Partial(max_N, sum_N, moment_N, squares_N)
