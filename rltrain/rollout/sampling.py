"""Counter-based sampling: one uniform number per token, and the inverse CDF of the fp32 softmax.

A token is a pure function of (run seed, step, problem id, its occurrence in the step, sample index, token position) and
of its logits. There is no generator state to save, and row order, batching and refill change nothing but the last bits
of the logits.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_BLOCK = 256


def row_key(seed: int, step: int, problem_id: str, sample_index: int, occurrence: int = 0) -> int:
    """The 64-bit signed key of one completion: BLAKE2b of the arguments, the same on every machine.

    ``occurrence`` is how often the step drew the problem before, on any rank, so that repeats are fresh draws.
    """
    # The free text comes last, so that no two sets of arguments spell the same string.
    repeat = f"#{occurrence:d}" if occurrence else ""
    name = f"{seed:d}/{step:d}/{sample_index:d}{repeat}/{problem_id}"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift of int64 (torch shifts the sign bit in)."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def uniforms(keys_B: Tensor, positions_B: Tensor) -> Tensor:
    """float64 in [0, 1), multiples of 2^-53: SplitMix64 (Steele et al. 2014) of stream ``key`` at ``position``.

    int64 arithmetic modulo 2^64, hence identical on CPU and GPU. The arguments broadcast.
    """
    bits = keys_B + (positions_B + 1) * _GOLDEN
    bits = (bits ^ _shift_right(bits, 30)) * _MIX_1
    bits = (bits ^ _shift_right(bits, 27)) * _MIX_2
    bits = bits ^ _shift_right(bits, 31)
    return _shift_right(bits, 11).double() * 2.0**-53


def _keep_top_k(logits_BV: Tensor, top_k: int) -> Tensor:
    """Mask all below the k-th largest logit; ties with it stay."""
    threshold_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < threshold_B1, -torch.inf)


def _keep_top_p(logits_BV: Tensor, top_p: float) -> Tensor:
    """Mask all but the smallest set of most probable tokens whose mass reaches ``top_p``; at least one stays."""
    sorted_BV, order_BV = logits_BV.sort(descending=True, stable=True)
    probabilities_BV = sorted_BV.softmax(-1)
    mass_before_BV = probabilities_BV.cumsum(-1, dtype=torch.float64) - probabilities_BV
    dropped_BV = (mass_before_BV >= top_p).scatter(-1, order_BV, mass_before_BV >= top_p)
    return logits_BV.masked_fill(dropped_BV, -torch.inf)


def distribution(logits_BV: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """fp32 probabilities of the distribution sampled from: temperature, then top-k, then top-p, then renormalised."""
    logits_BV = logits_BV.float()
    if temperature != 1:
        logits_BV = logits_BV / temperature
    if top_k:
        logits_BV = _keep_top_k(logits_BV, top_k)
    if top_p < 1:
        logits_BV = _keep_top_p(logits_BV, top_p)
    return logits_BV.softmax(-1)


def _first_above(weights_BV: Tensor, targets_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The first index whose float64 running sum exceeds the target, [B, 1], and the running sums.

    The index always has a positive weight: rounding cannot push a target up to the total or below 0.
    """
    running_BV = weights_BV.cumsum(-1, dtype=torch.float64)
    total_B1 = running_BV[:, -1:]
    targets_B1 = torch.minimum(targets_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(running_BV, targets_B1, right=True), running_BV


def inverse_cdf(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Index j with probability w_j / Σw, [B]: the first whose running sum exceeds u·Σw. Zero weights never win.

    Long rows are searched by block and then inside the block: running sums over a whole vocabulary cost more than the
    softmax.
    """
    if weights_BV.shape[-1] <= 4 * _BLOCK:
        targets_B1 = uniforms_B[:, None] * weights_BV.sum(-1, keepdim=True, dtype=torch.float64)
        return _first_above(weights_BV, targets_B1)[0].squeeze(-1)
    missing = -weights_BV.shape[-1] % _BLOCK
    if missing:
        weights_BV = torch.nn.functional.pad(weights_BV, (0, missing))
    blocks_BNK = weights_BV.unflatten(-1, (-1, _BLOCK))
    sums_BN = blocks_BNK.sum(-1)
    targets_B1 = uniforms_B[:, None] * sums_BN.sum(-1, keepdim=True, dtype=torch.float64)
    block_B1, running_BN = _first_above(sums_BN, targets_B1)
    before_B1 = running_BN.gather(-1, block_B1) - sums_BN.gather(-1, block_B1)
    chosen_BK = blocks_BNK[torch.arange(len(block_B1), device=block_B1.device), block_B1.squeeze(-1)]
    index_B1, _ = _first_above(chosen_BK, (targets_B1 - before_B1).clamp_(min=0))
    return (block_B1 * _BLOCK + index_B1).squeeze(-1)


def sample(
    logits_BV: Tensor, uniforms_B: Tensor, *, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Tokens [B] and their fp32 log-probs [B] under the very distribution they were drawn from.

    Inverse CDF in vocabulary order of the fp32 softmax after temperature, top-k and top-p. ``temperature=0`` takes the
    first largest logit; that distribution is a point mass, so its log-prob is 0.
    """
    tokens_B, logprobs_B, _ = sample_with_distribution(
        logits_BV, uniforms_B, temperature=temperature, top_k=top_k, top_p=top_p
    )
    return tokens_B, logprobs_B


def sample_with_distribution(
    logits_BV: Tensor, uniforms_B: Tensor, *, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`sample`, and the probabilities [B, V] that were drawn from, None for the point mass of temperature 0."""
    if temperature == 0:
        tokens_B = logits_BV.argmax(-1)
        return tokens_B, torch.zeros_like(tokens_B, dtype=torch.float32), None
    probabilities_BV = distribution(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p)
    tokens_B = inverse_cdf(probabilities_BV, uniforms_B)
    logprobs_B = probabilities_BV.gather(-1, tokens_B[:, None]).squeeze(-1).log()
    return tokens_B, logprobs_B, probabilities_BV


def entropy_and_collision(probabilities_BV: Tensor) -> Tensor:
    """``[B, 2]``: H = -Σ p log p in nats, and Σ p²."""
    entropy_B = torch.special.entr(probabilities_BV).sum(-1)
    return torch.stack([entropy_B, probabilities_BV.square().sum(-1)], dim=-1)
