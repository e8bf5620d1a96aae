"""The introspection head's mathematics (after ZIP-RC, 2512.01457): a joint grid over remaining length and reward.

Cell ``b·R + k`` of the C = B·R cells is length bin b and reward bin k. ``grid_NC`` are the logits of the reserved rows
at loss tokens: token t of a completion of T tokens is predicted from the state s_t, at which T - t tokens remain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rltrain.errors import RunError
from rltrain.runtime.introspection import IntrospectionConfig
from rltrain.types import Group, Mean, Metrics, TokenBatch


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Bins: bin b holds remaining lengths ``lengths[b] <= L < lengths[b + 1]``, bin k the rewards next to its own."""

    lengths: tuple[int, ...]
    rewards: tuple[float, ...]

    @classmethod
    def of(cls, config: IntrospectionConfig) -> Grid:
        """The grid of a config."""
        return cls(lengths=tuple(config.lengths), rewards=tuple(config.rewards))

    @property
    def middles_B(self) -> Tensor:
        """The length that stands for a bin: the mean of its first and last. The last bin counts as doubling."""
        starts_B = torch.tensor(self.lengths, dtype=torch.float64)
        ends_B = torch.cat([starts_B[1:], 2 * starts_B[-1:]])
        return (starts_B + ends_B - 1) / 2

    def covers(self, reward: float) -> bool:
        """Whether a reward lies between the first and the last of ``rewards``."""
        return self.rewards[0] <= reward <= self.rewards[-1]

    def cells_of(self, remaining_N: Tensor, rewards_N: Tensor) -> Tensor:
        """The observed cells, int64 [N]. Of two rewards that are equally near, the lower."""
        device = remaining_N.device
        starts_B = torch.tensor(self.lengths, device=device)
        length_N = torch.bucketize(remaining_N.long(), starts_B, right=True) - 1
        known_R = torch.tensor(self.rewards, dtype=torch.float64, device=device)
        reward_N = torch.bucketize(rewards_N.double(), (known_R[1:] + known_R[:-1]) / 2)
        return length_N * len(self.rewards) + reward_N

    def joint(self, grid_NC: Tensor) -> Tensor:
        """p(length bin, reward bin), fp32 or more, [N, B, R]."""
        wide_NC = grid_NC.to(torch.promote_types(grid_NC.dtype, torch.float32))
        return wide_NC.softmax(-1).unflatten(-1, (len(self.lengths), len(self.rewards)))

    def values(self, grid_NC: Tensor) -> Tensor:
        """``V(s) = Σ_k p(reward bin k)·reward_k`` [N], the marginal over lengths."""
        joint_NBR = self.joint(grid_NC)
        return joint_NBR.sum(-2) @ joint_NBR.new_tensor(self.rewards)

    def expected_lengths(self, grid_NC: Tensor) -> Tensor:
        """``Σ_b p(length bin b)·middle_b`` [N], in tokens."""
        joint_NBR = self.joint(grid_NC)
        return joint_NBR.sum(-1) @ self.middles_B.to(joint_NBR)


def refuse_uncovered(groups: Sequence[Group], config: IntrospectionConfig, step: int) -> None:
    """``RunError`` for a reward outside the bins, which is in no cell."""
    grid = Grid.of(config)
    for group in groups:
        for reward in [] if group.rewards_G is None else group.rewards_G.tolist():
            if not math.isnan(reward) and not grid.covers(reward):
                raise RunError(
                    f"step {step + 1}: problem {group.prompt.problem.id} has a reward of {reward:g}, outside "
                    f"model.introspection.rewards={config.rewards}; widen them"
                )


class Introspected(NamedTuple):
    """What the head gives beside log-probs: the grid's logits, and log-probs of the reference's likeliest tokens."""

    grid_NC: Tensor
    top_logprobs_NK: Tensor | None


def top_tokens(logits_NV: Tensor, count: int) -> Tensor:
    """The ``count`` likeliest ids and their log-probs, float64 [N, 2K]: ids first, exact up to 2^53."""
    top = logits_NV.double().log_softmax(-1).topk(min(count, logits_NV.shape[-1]), dim=-1)
    return torch.cat([top.indices.double(), top.values], dim=-1)


def kl_of_top(frozen_NK: Tensor, policy_NK: Tensor) -> Tensor:
    """KL(frozen || policy) [N] with K tokens apart and all others as one, from log-probs of the K tokens.

    The others' own KL is left out, so that this is at most the KL of the whole distributions, and 0 where they agree.
    """
    frozen_NK = frozen_NK.to(policy_NK.dtype)
    floor = torch.finfo(policy_NK.dtype).eps
    rest_frozen_N = (1 - frozen_NK.exp().sum(-1)).clamp(min=floor)
    rest_N = (1 - policy_NK.exp().sum(-1)).clamp(min=floor)
    apart_NK = torch.where(frozen_NK.isneginf(), 0.0, frozen_NK.exp() * (frozen_NK - policy_NK))
    return apart_NK.sum(-1) + rest_frozen_N * (rest_frozen_N.log() - rest_N.log())


def introspection_loss(
    introspected: Introspected, batch: TokenBatch, config: IntrospectionConfig, *, tokens: float
) -> tuple[Tensor, Metrics]:
    """``Σ_n (weight·CE_n + kl_coef·KL_n) / tokens`` over tokens that carry loss, and metrics; KL where ``alone``.

    CE is the cross-entropy to the observed cell, in nats. ``tokens`` are those of the optimiser batch on all ranks.
    """
    assert batch.remaining_N is not None and batch.rewards_N is not None
    real_N = batch.weights_N > 0
    grid, grid_NC = Grid.of(config), introspected.grid_NC[real_N]
    cells_N = grid.cells_of(batch.remaining_N[real_N], batch.rewards_N[real_N])
    entropy_N = torch.nn.functional.cross_entropy(grid_NC.float(), cells_N, reduction="none")
    loss = config.weight * entropy_N.sum() / tokens
    metrics: dict[str, Mean] = {}
    if introspected.top_logprobs_NK is not None:
        assert batch.top_logprobs_NK is not None
        kl_N = kl_of_top(batch.top_logprobs_NK[real_N], introspected.top_logprobs_NK[real_N])
        loss = loss + config.kl_coef * kl_N.sum() / tokens
        metrics["introspection/kl"] = Mean.of(kl_N.detach())
    return loss, metrics | _metrics(grid, grid_NC.detach(), entropy_N.detach(), batch, real_N)


def _metrics(grid: Grid, grid_NC: Tensor, entropy_N: Tensor, batch: TokenBatch, real_N: Tensor) -> dict[str, Mean]:
    assert batch.remaining_N is not None and batch.rewards_N is not None
    gap_N = grid.values(grid_NC) - batch.rewards_N[real_N]
    length_gap_N = grid.expected_lengths(grid_NC) - batch.remaining_N[real_N]
    return {
        "introspection/cross_entropy": Mean.of(entropy_N),
        "introspection/squared_error": Mean.of(gap_N.square()),
        "introspection/bias": Mean.of(gap_N),
        "introspection/length_error_tokens": Mean.of(length_gap_N.abs()),
    }
