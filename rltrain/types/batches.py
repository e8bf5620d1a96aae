"""What the loss is computed from, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rltrain.types.metrics import Metrics

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """A packed micro-batch.

    Sequence s occupies ``input_ids_L[boundaries_S1[s]:boundaries_S1[s + 1]]`` and restarts its positions at 0.
    Loss token n is predicted by the hidden state at ``source_N[n]`` and belongs to sequence ``sequence_N[n]``;
    its weight was set over the whole optimiser batch and all ranks, so the loss is a plain weighted sum.

    Without ``old_logprobs_N`` the policy before the update is the current one, as in the only update of a step.
    ``selected_N`` are the tokens that the loss chose once a minibatch (``LossConfig.marked``). ``keys_N`` names a token
    by its problem, sample and place, whatever the micro-batches and ranks. ``rewards_N`` is the reward of the token's
    completion, ``remaining_N`` how many of its tokens are left, this one included. ``top_NK`` are the frozen policy's
    likeliest ids at the token's place and ``top_logprobs_NK`` their log-probs.

    Without ``prefix_S`` the sequences are forwarded as padded rows; with it as they lie, end to end. Then sequence s
    continues sequence ``prefix_S[s]`` (a prompt that several completions share), or none (-1): it attends to the
    prefix's tokens without repeating them, and its positions go on from there.
    """

    input_ids_L: Tensor
    positions_L: Tensor
    boundaries_S1: Tensor
    source_N: Tensor
    sequence_N: Tensor
    targets_N: Tensor
    weights_N: Tensor
    advantages_N: Tensor
    sampler_logprobs_N: Tensor
    old_logprobs_N: Tensor | None = None
    reference_logprobs_N: Tensor | None = None
    selected_N: Tensor | None = None
    keys_N: Tensor | None = None
    rewards_N: Tensor | None = None
    remaining_N: Tensor | None = None
    top_NK: Tensor | None = None
    top_logprobs_NK: Tensor | None = None
    prefix_S: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.targets_N)
        for name in (name for name in vars(self) if name.endswith("_N")):
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise ValueError(f"TokenBatch: {name} has {len(value)} entries, targets_N has {count}")
        if len(self.input_ids_L) != len(self.positions_L) or int(self.boundaries_S1[-1]) != len(self.input_ids_L):
            raise ValueError("TokenBatch: boundaries_S1 must end at the number of input ids and positions")
        if self.prefix_S is not None and len(self.prefix_S) != len(self.boundaries_S1) - 1:
            raise ValueError("TokenBatch: prefix_S must have one entry per sequence")


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """The loss of a micro-batch, its metrics, and the log-probs, without gradient, that it was computed from."""

    loss: Tensor
    metrics: Metrics
    logprobs_N: Tensor
