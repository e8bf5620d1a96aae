"""The fused head: against all logits, its bits, its time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from gpu_checks.machine import Finding, Machine, check, short
from rltrain import kernels


def head(machine: Machine, rows: int, vocabulary: int, width: int, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Hidden states, weights and targets of a head whose logits spread by about one."""
    generator = torch.Generator(machine.device).manual_seed(rows)
    options = {"generator": generator, "device": machine.device}
    hidden_ND = torch.randn(rows, width, **options).to(dtype).requires_grad_()
    weight_VD = (torch.randn(vocabulary, width, **options) / width**0.5).to(dtype).requires_grad_()
    return hidden_ND, weight_VD, torch.randint(vocabulary, (rows,), **options)


def head_results(
    case: tuple[Any, Any, Any], backend: Any, *, weights_N: torch.Tensor | None = None, **options: Any
) -> list[torch.Tensor]:
    """Log-probs, entropies, and the gradients of a weighted sum of both."""
    hidden_ND, weight_VD, targets_N = case
    logprobs_N, entropy_N = kernels.token_logprobs(
        hidden_ND, weight_VD, targets_N, entropy=True, backend=backend, **options
    )
    assert entropy_N is not None
    if weights_N is None:
        weights_N = weights_of(targets_N)
    total = (weights_N * logprobs_N).sum() + 0.1 * entropy_N.sum()
    return [logprobs_N.detach(), entropy_N.detach(), *torch.autograd.grad(total, [hidden_ND, weight_VD])]


def weights_of(targets_N: torch.Tensor) -> torch.Tensor:
    """The weight of each row's log-prob in the sum whose gradients are compared."""
    return torch.linspace(-1, 2, len(targets_N), device=targets_N.device)


def reference_results(case: tuple[Any, Any, Any], *, piece_rows: int, **options: Any) -> list[torch.Tensor]:
    """Those of the plain path in pieces of rows, so that few logits exist at a time; gradients of W add up in fp32."""
    hidden_ND, weight_VD, targets_N = case
    rows: list[list[torch.Tensor]] = []
    grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
    weights_N = weights_of(targets_N)
    for start in range(0, len(targets_N), piece_rows):
        piece = slice(start, start + piece_rows)
        here = (hidden_ND[piece].detach().requires_grad_(), weight_VD, targets_N[piece])
        *of_rows, grad = head_results(here, "reference", weights_N=weights_N[piece], **options)
        rows.append(of_rows)
        grad_VD += grad
    return [*(torch.cat(parts) for parts in zip(*rows, strict=True)), grad_VD]


def apart(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference of a result, relative to the largest value of what it should be."""
    return max(
        float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-6))
        for a, b in zip(found, expected, strict=True)
    )


@check("the fused head against all logits")
def head_against_reference(machine: Machine) -> Finding:
    """Log-probs, entropy and gradients of the backend that training takes, plain, sliced, with bias and softcap."""
    backend = "blocked" if machine.small else "triton"
    vocabulary = 2_000 if machine.small else 151_936
    sizes = [(1, 64), (256, 64)] if machine.small else [(1, 1024), (4096, 1024), (16384, 1024), (4096, 4096)]
    worst, limits = {}, {torch.float32: 2e-3, torch.bfloat16: 3e-2}
    for dtype in machine.dtypes:
        worst[dtype] = 0.0
        for rows, width in sizes:
            case = head(machine, rows, vocabulary, width, dtype)
            bias_V = torch.randn(vocabulary, device=machine.device).to(dtype)
            wide = (case[0], case[1][: vocabulary - 3], case[2] % (vocabulary - 3))
            for inputs, options in (
                (case, {}),
                (case, {"bias_V": bias_V, "softcap": 30.0}),
                (wide, {"temperature": 0.7}),
            ):
                expected = reference_results(inputs, piece_rows=64 if machine.small else 1024, **options)
                worst[dtype] = max(worst[dtype], apart(head_results(inputs, backend, **options), expected))
    found = ", ".join(f"{short(dtype)} {value:.1e}" for dtype, value in worst.items())
    bounds = ", ".join(f"{short(dtype)} below {limits[dtype]:.0e}" for dtype in worst)
    return Finding(
        expected=f"{backend}, all rows and gradients: {bounds}",
        found=found,
        ok=all(worst[d] <= limits[d] for d in worst),
    )


@check("the fused head: the same bits twice, and more than 2^31 logits")
def head_repeats(machine: Machine) -> Finding:
    """No atomics, and offsets in int64."""
    backend = "blocked" if machine.small else "triton"
    rows, vocabulary = (512, 1000) if machine.small else (16384, 151_936)
    case = head(machine, rows, vocabulary, 64, machine.dtypes[0])
    first, again = head_results(case, backend), head_results(case, backend)
    same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    last = (case[0][-8:].detach().requires_grad_(), case[1], case[2][-8:])
    tail = apart([first[0][-8:]], [head_results(last, "reference")[0]])
    found = f"{'equal' if same else 'other'} bits; last rows apart by {tail:.1e} of {rows * vocabulary:.1e} logits"
    return Finding(expected="equal bits; last rows within 3e-02", found=found, ok=same and tail <= 3e-2)


@check("time of the head")
def time_of_the_head(machine: Machine) -> Finding:
    """Forward and backward, ms, of our backends and of the peers that are installed."""
    rows, vocabulary, width = (128, 4_000, 64) if machine.small else (4096, 151_936, 1024)
    case = head(machine, rows, vocabulary, width, machine.dtypes[0])
    hidden_ND, weight_VD, targets_N = case

    def naive() -> None:
        loss = functional.cross_entropy((hidden_ND @ weight_VD.T).float(), targets_N)
        torch.autograd.grad(loss, [hidden_ND, weight_VD])

    def fused() -> None:
        loss = kernels.fused_token_loss(hidden_ND, weight_VD, targets_N, lambda logprobs_n, *_: -logprobs_n).loss
        torch.autograd.grad(loss, [hidden_ND, weight_VD])

    sides = {"naive": naive, "blocked": lambda: head_results(case, "blocked"), "fused": fused} | peers(case)
    if not machine.small:
        sides["triton"] = lambda: head_results(case, "triton")
    found = ", ".join(f"{name} {1e3 * machine.seconds(run):.1f}" for name, run in sides.items())
    return Finding(expected=f"ms of {rows} x {vocabulary}, D {width}", found=found, ok=True)


def peers(case: tuple[Any, Any, Any]) -> dict[str, Callable[[], Any]]:
    """Liger-Kernel's and Apple's heads where they are installed."""
    hidden_ND, weight_VD, targets_N = case
    found: dict[str, Callable[[], Any]] = {}
    if importlib.util.find_spec("liger_kernel") and hidden_ND.is_cuda:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

        loss = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = lambda: loss(weight_VD, hidden_ND, targets_N).backward()
    if importlib.util.find_spec("cut_cross_entropy") and hidden_ND.is_cuda:
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

        found["cce"] = lambda: linear_cross_entropy(hidden_ND, weight_VD, targets_N).backward()
    return found
