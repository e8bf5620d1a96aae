"""Token log-probs against their peers: time and extra memory of the head at three model sizes, fp32 and bf16.

    python scripts/bench/logprobs.py                                     # everything: minutes on two quiet cores
    python scripts/bench/logprobs.py --shapes 512,576,49152 --dtypes fp32 --what time
    python scripts/bench/logprobs.py --shapes 256,64,4096                # a smoke run
    python scripts/bench/logprobs.py --what collision                    # what Σ p² costs beside log-probs and entropy

Peers: naive log_softmax, torch.nn.functional.linear_cross_entropy, and where installed TRL's chunked head (`trl`),
Liger-Kernel's chunked log-probs (`liger-kernel`) and Apple's CCE in its torch_compile mode (`cut-cross-entropy`, which
needs a C++ compiler on a CPU).

Time is the median over rounds of the ratio to the floor measured in the same round: the bare matrix products, three
for paths that keep logits and four for those that recompute them, with dh and dW in fresh memory as any gradient is.
Memory is the peak resident size of a child process over one forward and backward, less the inputs and the gradients;
it does not depend on how busy the machine is, so ``--what`` lets the two be measured apart.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import timing
import torch
import torch.nn.functional as F
from torch import Tensor

from rltrain import kernels

SHAPES = ("1024,896,32000", "512,576,49152", "256,896,151936")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WHAT = ("time", "memory", "collision")
MODES = ("forward", "forward+backward", "forward+backward+entropy")
Loss = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def _mean(logprobs_N: Tensor, entropy_N: Tensor | None) -> Tensor:
    return -logprobs_N.mean() if entropy_N is None else -logprobs_N.mean() - 0.01 * entropy_N.mean()


def naive(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, entropy: bool) -> Tensor:
    """All logits, log_softmax, gather."""
    logprobs_NV = (hidden_ND @ weight_VD.T).float().log_softmax(-1)
    logprobs_N = logprobs_NV.gather(-1, targets_N[:, None]).squeeze(-1)
    return _mean(logprobs_N, -(logprobs_NV.exp() * logprobs_NV).sum(-1) if entropy else None)


def blocked(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, entropy: bool) -> Tensor:
    """Ours, four products."""
    return _mean(*kernels.token_logprobs(hidden_ND, weight_VD, targets_N, entropy=entropy, backend="blocked"))


def fused(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, entropy: bool) -> Tensor:
    """Ours, three products."""
    rows = len(hidden_ND)

    def token_loss(logprobs_n: Tensor, entropy_n: Tensor | None, _: slice) -> Tensor:
        return _mean(logprobs_n, entropy_n) * (len(logprobs_n) / rows)

    return kernels.fused_token_loss(hidden_ND, weight_VD, targets_N, token_loss, entropy=entropy).loss


def torch_linear(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, entropy: bool) -> Tensor:
    """torch's own chunked head; it has no entropy."""
    return F.linear_cross_entropy(hidden_ND, weight_VD, targets_N, options=torch.nn.LinearCrossEntropyOptions())


def trl(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, entropy: bool) -> Tensor:
    """TRL's head in its default tile of the vocabulary."""
    from trl.kernels import ChunkedLogProbFunction

    outputs = ("entropy",) if entropy else ()
    found = ChunkedLogProbFunction.apply(hidden_ND, weight_VD, None, targets_N, 1.0, 8192, None, 1.0, outputs)
    return _mean(found[0], found[1] if entropy else None)


def liger(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, entropy: bool) -> Tensor:
    """The log-probs inside Liger's chunked GRPO loss; no entropy."""
    from liger_kernel.chunked_loss import fused_linear_ppo

    return -fused_linear_ppo._ChunkedSelectiveLogProbFunction.apply(
        hidden_ND, weight_VD, targets_N, None, 1.0, fused_linear_ppo._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    ).mean()


def cce(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, entropy: bool) -> Tensor:
    """Apple's torch_compile mode; no entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden_ND, weight_VD, targets_N, impl="torch_compile")


PATHS: dict[str, Loss] = {
    "naive": naive,
    "rltrain token_logprobs": blocked,
    "rltrain fused_token_loss": fused,
    "torch linear_cross_entropy": torch_linear,
    "TRL": trl,
    "Liger": liger,
    "CCE torch_compile": cce,
}
WITH_ENTROPY = ("naive", "rltrain token_logprobs", "rltrain fused_token_loss", "TRL")
RECOMPUTING = ("rltrain token_logprobs", "TRL", "Liger")


def inputs(shape: str, dtype: str, *, logits: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets, and room for [N, V] if asked for; logits have about unit variance."""
    N, D, V = (int(size) for size in shape.split(","))
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(N, D, generator=generator).to(DTYPES[dtype]).requires_grad_()
    weight_VD = torch.randn(V, D, generator=generator).mul_(D**-0.5).to(DTYPES[dtype]).requires_grad_()
    targets_N = torch.randint(V, (N,), generator=generator)
    return hidden_ND, weight_VD, targets_N, torch.randn(N if logits else 0, V, generator=generator).to(DTYPES[dtype])


def run(path: Loss, tensors: tuple[Tensor, ...], mode: str) -> float:
    """Seconds of one call."""
    hidden_ND, weight_VD, targets_N, _ = tensors
    hidden_ND.grad = weight_VD.grad = None
    start = time.perf_counter()
    with torch.set_grad_enabled(mode != "forward"):
        loss = path(hidden_ND, weight_VD, targets_N, mode.endswith("entropy"))
        if loss.requires_grad:
            loss.backward()
    return time.perf_counter() - start


@torch.no_grad()
def floor(tensors: tuple[Tensor, ...], products: int) -> float:
    """Seconds of the bare products: logits once or twice, dh, dW; one product is the forward alone."""
    hidden_ND, weight_VD, _, logits_NV = tensors
    start = time.perf_counter()
    for _ in range(max(products - 2, 1)):
        torch.mm(hidden_ND, weight_VD.T, out=logits_NV)
    if products > 1:
        torch.mm(logits_NV, weight_VD)
        torch.mm(logits_NV.T, hidden_ND)
    return time.perf_counter() - start


def installed(path: Loss, mode: str) -> bool:
    """False, with a note, for a peer that is not installed or does not run here."""
    try:
        run(path, inputs("32,16,64", "fp32", logits=False), mode)
    except Exception as error:  # A peer may fail in any way; its row is left out and the reason printed.
        reason = str(error).strip().splitlines() or [""]
        print(f"left out, {path.__name__}: {type(error).__name__} {reason[0][:120]}", file=sys.stderr)
        return False
    return True


def peak_extra_mb(name: str, shape: str, dtype: str, threads: int) -> float:
    """Extra memory of a path in a process of its own, MB."""
    setting = ["--shapes", shape, "--dtypes", dtype, "--threads", str(threads)]
    command = [sys.executable, __file__, "--child", name, *setting]
    found = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return float(found.stdout.split()[-1]) if found.returncode == 0 else float("nan")


def child(name: str, shape: str, dtype: str) -> None:
    """Print how far the resident size rose over one forward and backward, less the gradients, MB."""
    warm = inputs("64,64,512", dtype, logits=False)
    run(PATHS[name], warm, "forward+backward")
    tensors = inputs(shape, dtype, logits=False)
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in tensors[:2])
    print(timing.peak_extra_mb(lambda: run(PATHS[name], tensors, "forward+backward")) - gradients / 1e6)


def compare_memory(shape: str, dtype: str, options: argparse.Namespace) -> None:
    """Print the extra memory of every path."""
    memory_mb = {name: peak_extra_mb(name, shape, dtype, options.threads) for name in options.available}
    for name, own_mb in memory_mb.items():
        print(f"| {shape} | {dtype} | {name} | {own_mb:.0f} | {own_mb / memory_mb['naive']:.3f} |", flush=True)


def compare_time(shape: str, dtype: str, mode: str, options: argparse.Namespace) -> None:
    """Print the rows of one setting."""
    names = [name for name in options.available if name in WITH_ENTROPY or not mode.endswith("entropy")]
    tensors = inputs(shape, dtype, logits=True)
    products = {name: 1 if mode == "forward" else 4 if name in RECOMPUTING else 3 for name in names}
    seconds: dict[str | int, list[float]] = {key: [] for key in (*names, *products.values())}
    for _ in range(options.rounds + 1):
        for key in seconds:
            seconds[key].append(floor(tensors, key) if isinstance(key, int) else run(PATHS[key], tensors, mode))
    timed = {key: values[1:] for key, values in seconds.items()}
    for name in names:
        to_floor, to_naive = (
            statistics.median(own / other for own, other in zip(timed[name], timed[base], strict=True))
            for base in (products[name], "naive")
        )
        cells = f"{statistics.median(timed[name]):.3f} | {products[name]} | {to_floor:.2f} | {to_naive:.2f}"
        print(f"| {shape} | {dtype} | {mode} | {name} | {cells} |", flush=True)


def scored(path: Any, tensors: tuple[Tensor, ...], *, collision: bool) -> float:
    """Seconds of one scoring pass: log-probs and entropies, and collision probabilities or not."""
    hidden_ND, weight_VD, targets_N, _ = tensors
    options: dict[str, Any] = {"entropy": True, "collision": collision}
    start = time.perf_counter()
    with torch.no_grad():
        if path == "fused_token_loss":
            kernels.fused_token_loss(hidden_ND, weight_VD, targets_N, lambda logprobs_n, *_: -logprobs_n, **options)
        else:
            kernels.token_logprobs(hidden_ND, weight_VD, targets_N, backend=path, **options)
    return time.perf_counter() - start


def compare_collision(shape: str, dtype: str, options: argparse.Namespace) -> None:
    """Print what collision probabilities add to a scoring pass: the median of the ratios of pairs, and their range."""
    tensors = inputs(shape, dtype, logits=False)
    for path in ("reference", "blocked", "fused_token_loss"):
        pairs = [
            [scored(path, tensors, collision=wanted) for wanted in (False, True)] for _ in range(options.rounds + 1)
        ]
        ratios = sorted(after / before for before, after in pairs[1:])
        cells = f"{statistics.median(ratios):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(f"| {shape} | {dtype} | {path} | {cells} |", flush=True)


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="N,D,V")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=list(PATHS), help="always with naive")
    parser.add_argument("--what", nargs="+", default=WHAT, choices=WHAT)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", choices=list(PATHS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        child(options.child, options.shapes[0], options.dtypes[0])
        return
    asked = [name for name in PATHS if name == "naive" or name in options.paths]
    options.available = [name for name in asked if installed(PATHS[name], "forward+backward")]
    settings = [(shape, dtype) for shape in options.shapes for dtype in options.dtypes]
    if "time" in options.what:
        print("| N, D, V | type | mode | path | s | products | / floor | / naive |")
        print("|---|---|---|---|---|---|---|---|")
        for shape, dtype in settings:
            for mode in options.modes:
                compare_time(shape, dtype, mode, options)
    if "memory" in options.what:
        print("| N, D, V | type | path | extra MB | / naive |")
        print("|---|---|---|---|---|")
        for shape, dtype in settings:
            compare_memory(shape, dtype, options)
    if "collision" in options.what:
        print("| N, D, V | type | path | with / without collision | range |")
        print("|---|---|---|---|---|")
        for shape, dtype in settings:
            compare_collision(shape, dtype, options)


if __name__ == "__main__":
    main()
