"""Squared norm of a token's score in its logits: how much a token moves the policy, up to the Jacobian below them."""

from __future__ import annotations

import torch
from torch import Tensor

from rltrain.advantages.written import written_mask
from rltrain.types import Completion, TokenEntropy


def exact_norms(completion: Completion, token: TokenEntropy) -> Tensor:
    """``|grad log pi(a_t)|² = 1 - 2 p + sum_v pi_v²`` in the logits of place t, float64, shape [T], at least 0.

    0 at ids that an environment wrote, which have no score.
    """
    probability_T = torch.tensor(completion.logprobs, dtype=torch.float64).exp()
    return _at_written((1 - 2 * probability_T + token.collision_T.double()).clamp(min=0), completion)


def lite_norms(completion: Completion) -> Tensor:
    """``(1 - p)²``, the part of :func:`exact_norms` in the sampled token's own logit. It needs the log-probs alone."""
    return _at_written((1 - torch.tensor(completion.logprobs, dtype=torch.float64).exp()).square(), completion)


def _at_written(norms_T: Tensor, completion: Completion) -> Tensor:
    return norms_T.masked_fill(~written_mask(completion), 0.0) if completion.turns else norms_T
