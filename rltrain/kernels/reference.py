"""The plain head with all logits at once: the reference for the other backends."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    collision: bool = False,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``log p(y)``, ``H(p) = -Σ p log p`` (nats), ``Σ p²`` of ``p = softmax((cap(h Wᵀ) + b) / T)``.

    ``cap(u) = c·tanh(u/c)``. The collision probability has no gradient. The epilogue is in fp32 (fp64 for fp64 inputs).
    A bias of -inf masks an entry.
    """
    logits_NV = head_logits(hidden_ND, weight_VD, bias_V=bias_V, softcap=softcap)
    return logits_logprobs(logits_NV, targets_N, temperature=temperature, entropy=entropy, collision=collision)


def head_logits(
    hidden_ND: Tensor, weight_VD: Tensor, *, bias_V: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """``cap(h Wᵀ) + b``, in fp32 or more."""
    logits_NV = hidden_ND @ weight_VD.T
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return logits_NV if bias_V is None else logits_NV + bias_V


def logits_logprobs(
    logits_NV: Tensor, targets_N: Tensor, *, temperature: float, entropy: bool, collision: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``log p(y)``, ``H(p)`` (nats) and ``Σ p²`` of ``p = softmax(logits / T)``, in fp32 or more.

    The last two are None if not asked for.
    """
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    logprobs_NV = (wide_NV / temperature).log_softmax(-1)
    logprobs_N = logprobs_NV.gather(-1, targets_N[:, None]).squeeze(-1)
    collision_N = logprobs_NV.detach().mul(2).exp_().sum(-1) if collision else None
    if not entropy:
        return logprobs_N, None, collision_N
    # A finite floor, so that an entry with p = 0 adds 0·finite, in the value and in the gradient.
    finite_NV = logprobs_NV.clamp(min=torch.finfo(logprobs_NV.dtype).min)
    return logprobs_N, -(finite_NV.exp() * finite_NV).sum(-1), collision_N
