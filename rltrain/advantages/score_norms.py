"""Squared norm of a token's score in its logits: how much a token moves the policy, up to the Jacobian below them."""

from __future__ import annotations

import torch
from torch import Tensor

from rltrain.types import Completion, TokenEntropy


def exact_norms(completion: Completion, token: TokenEntropy) -> Tensor:
    """``|grad log pi(a_t)|² = 1 - 2 p + sum_v pi_v²`` in the logits of place t, float64, shape [T], at least 0."""
    probability_T = torch.tensor(completion.logprobs, dtype=torch.float64).exp()
    return (1 - 2 * probability_T + token.collision_T.double()).clamp(min=0)


def lite_norms(completion: Completion) -> Tensor:
    """``(1 - p)²``, the part of :func:`exact_norms` in the sampled token's own logit. It needs the log-probs alone."""
    return (1 - torch.tensor(completion.logprobs, dtype=torch.float64).exp()).square()
