"""Token log-probs and entropies of a language-model head without holding [N, V]: an interface to three backends."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Literal, overload

import torch
from torch import Tensor

from rltrain.kernels import fused
from rltrain.kernels.fused import FusedLoss, TokenLoss

Backend = Literal["reference", "blocked", "triton"]
BACKENDS: tuple[Backend, ...] = ("reference", "blocked", "triton")

SMALL_ELEMENTS = 2**20
"""The number of logits (4 MB) up to which the plain path is used."""

__all__ = [
    "BACKENDS",
    "Backend",
    "FusedLoss",
    "TokenLoss",
    "choose_backend",
    "fused_token_loss",
    "prefers_fused",
    "token_logprobs",
]


def choose_backend(hidden_ND: Tensor, weight_VD: Tensor) -> Backend:
    """The choice of ``backend="auto"``: reference for few logits, else Triton on CUDA, else torch blocks."""
    if _is_small(len(hidden_ND), len(weight_VD)):
        return "reference"
    if hidden_ND.is_cuda and hidden_ND.dtype != torch.float64 and importlib.util.find_spec("triton"):
        return "triton"
    return "blocked"


def _is_small(rows: int, vocabulary: int) -> bool:
    return rows * vocabulary <= SMALL_ELEMENTS


def prefers_fused(rows: int, vocabulary: int, device: torch.device) -> bool:
    """Whether :func:`fused_token_loss` is faster than :func:`token_logprobs`, which computes logits twice: on a CPU.

    Not timed on a GPU.
    """
    return device.type == "cpu" and not _is_small(rows, vocabulary)


@overload
def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    collision: Literal[False] = False,
    backend: Literal["auto"] | Backend = "auto",
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]: ...


@overload
def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    collision: Literal[True],
    backend: Literal["auto"] | Backend = "auto",
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]: ...


def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    collision: bool = False,
    backend: Literal["auto"] | Backend = "auto",
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """``log p(y)`` and, if asked for, ``H(p) = -Σ p log p`` (nats) of ``p = softmax((cap(h Wᵀ) + b) / T)``.

    ``cap(u) = c·tanh(u/c)`` for ``softcap=c`` (Gemma), the identity otherwise. A bias of -inf masks an entry. Both
    results are fp32 (fp64 for fp64 inputs) and differentiable once in hidden, weight and bias. An input that needs
    no gradient (a frozen head) costs none. For ``"auto"`` see :func:`choose_backend`. N may be 0. ``collision=True``
    adds a third result, ``Σ p²`` [N], which has no gradient.

    Raises ValueError for shapes or types that do not fit, and for targets outside [0, V) on a CPU.
    """
    _check(hidden_ND, weight_VD, targets_N, temperature, bias_V)
    if backend == "auto":
        backend = choose_backend(hidden_ND, weight_VD)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend}: unknown; choose auto or one of {', '.join(BACKENDS)}")
    # Imported on use, because Triton is optional and slow to import.
    implementation = importlib.import_module(f"rltrain.kernels.{backend}")
    logprobs_N, entropy_N, collision_N = implementation.token_logprobs(
        hidden_ND,
        weight_VD,
        targets_N,
        temperature=temperature,
        entropy=entropy,
        collision=collision,
        bias_V=bias_V,
        softcap=softcap,
    )
    return (logprobs_N, entropy_N, collision_N) if collision else (logprobs_N, entropy_N)


def fused_token_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    token_loss: TokenLoss,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    collision: bool = False,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> FusedLoss:
    """``Σ_N token_loss`` with its gradient made in the forward: three products where ``token_logprobs`` has four.

    ``token_loss(logprobs_n, entropy_n, rows) -> loss_n`` is called once per chunk of rows, ``rows`` being their slice,
    and differentiated by autograd. It may return their sum. It must be separable: a row's loss depends on that row
    alone, as with clipped ratios per token. For GSPO's sequence ratio use ``token_logprobs``.
    dh and dW are held from the forward to ``backward``, which may be called once. The rest is as in
    :func:`token_logprobs`. A bf16 dW is rounded once per chunk, two up to N = 1024.
    ``collision=True`` sets ``collision_N`` of the result.
    """
    _check(hidden_ND, weight_VD, targets_N, temperature, bias_V)
    return fused.fused_token_loss(
        hidden_ND,
        weight_VD,
        targets_N,
        token_loss,
        temperature=temperature,
        entropy=entropy,
        collision=collision,
        bias_V=bias_V,
        softcap=softcap,
    )


def _check(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float, bias_V: Tensor | None) -> None:
    rows, vocabulary = len(hidden_ND), len(weight_VD)
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden {tuple(hidden_ND.shape)} and weight {tuple(weight_VD.shape)}: need [N, D] and [V, D]")
    if hidden_ND.dtype != weight_VD.dtype:
        raise ValueError(f"hidden is {hidden_ND.dtype}, weight {weight_VD.dtype}: cast one; a head has one precision")
    if targets_N.shape != (rows,):
        raise ValueError(f"targets have shape {tuple(targets_N.shape)}: need ({rows},), one per row of hidden")
    if bias_V is not None and bias_V.shape != (vocabulary,):
        raise ValueError(f"bias has shape {tuple(bias_V.shape)}: need ({vocabulary},), one per row of weight")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be > 0")
    if rows and targets_N.device.type == "cpu" and not 0 <= int(targets_N.min()) <= int(targets_N.max()) < vocabulary:
        raise ValueError(f"targets span {int(targets_N.min())}..{int(targets_N.max())}: must lie in [0, {vocabulary})")
