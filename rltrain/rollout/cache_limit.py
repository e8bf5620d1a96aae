"""How many tokens the keys and values of a rollout may take: as configured, and as the device has memory for."""

from __future__ import annotations

from typing import Any

import torch

from rltrain.errors import ConfigError
from rltrain.policy import capabilities

RESERVE_SHARE = 0.1  # of the device's memory, for activations of prefill and for what the allocator cannot use
LOGITS_BYTES = 16  # an entry of [rows, V]: logits, fp32 probabilities, float64 running sums


def token_bytes(model: Any) -> int:
    """Bytes of a token's keys and values in all layers."""
    config = model.config.get_text_config()
    numbers = 2 * config.num_hidden_layers * capabilities.kv_heads(config) * capabilities.head_size(config)
    return numbers * model.dtype.itemsize


def free_bytes(device: torch.device) -> int | None:
    """What the cache may take on a device, less a reserve; None where nothing says so (a CPU)."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + unused - RESERVE_SHARE * total)


def limit_tokens(model: Any, *, configured: int, rows: int, free: int | None) -> int | None:
    """:func:`bounded_tokens` of a model."""
    return bounded_tokens(
        configured=configured,
        rows=rows,
        free=free,
        vocabulary=model.config.get_text_config().vocab_size,
        token_bytes=1 if free is None else token_bytes(model),  # a recurrent model has no keys to count
    )


def bounded_tokens(
    *, configured: int, rows: int, free: int | None, vocabulary: int, token_bytes: int
) -> int | None:  # fmt: skip
    """The smaller of ``configured`` (0: none) and what fits into ``free`` bytes beside the logits of ``rows`` rows."""
    limits = [configured] if configured else []
    if free is not None:
        limits.append(max(0, free - rows * vocabulary * LOGITS_BYTES) // token_bytes)
    return min(limits, default=None)


def refuse_small_cache(limit: int | None, *, prompt_tokens: int, rows: int, new_tokens: int) -> None:
    """``ConfigError`` where not even a single group fits: the longest prompt, and ``new_tokens`` for each row."""
    needed = prompt_tokens + rows * new_tokens
    if limit is not None and needed > limit:
        raise ConfigError(
            f"rollout: the cache may hold {limit} tokens, and a group takes {needed}: a prompt of {prompt_tokens} and "
            f"{rows} x {new_tokens} new ones; lower sampling.max_new_tokens or batch.group_size (evaluation.samples), "
            "or raise rollout.max_cache_tokens if that is set"
        )
