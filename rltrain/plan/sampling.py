"""Memory of a rank's rollout: the cache, what sampling takes beside it, and what a sampler holds while the rank trains.

``rollout=local`` bounds its cache as the decoder does (:mod:`rltrain.rollout.cache_limit`); vLLM takes what is left.
"""

from __future__ import annotations

import dataclasses

from rltrain.config import RunConfig
from rltrain.plan.devices import GIB
from rltrain.plan.load import RankLoad
from rltrain.plan.model_shape import FP32_BYTES, ModelShape
from rltrain.rollout.cache_limit import LOGITS_BYTES, RESERVE_SHARE, bounded_tokens
from rltrain.rollout.local import LocalRolloutConfig
from rltrain.rollout.shared_prompt_decoder import grown
from rltrain.rollout.vllm import VllmRolloutConfig
from rltrain.rollout.vllm_colocated import CACHE_GIB

# Of a colocated vLLM, also while it sleeps: CUDA graphs, its compiled kernels and workspaces.
VLLM_RESIDENT_GIB = 2.0
VLLM_ROWS = 256  # vLLM's max_num_seqs on most cards


def sampler_bytes(config: RunConfig, shape: ModelShape) -> tuple[int, int, bool]:
    """Bytes that the rollout holds while the rank trains, weights that sampling adds, and whether both overlap.

    Sampling adds the weights of a vLLM that slept, or those that the local decoder merges from LoRA or stacks.
    """
    rollout = config.rollout
    if isinstance(rollout, VllmRolloutConfig):
        if rollout.mode == "server":
            return 0, 0, False
        resident, weights = round(VLLM_RESIDENT_GIB * GIB), shape.parameters * shape.dtype_bytes
        return (resident, weights, False) if rollout.sleep else (resident + weights, 0, True)
    decoded = decoded_shape(config, shape)
    copies = decoded.decode_copies * decoded.dtype_bytes
    if rollout.ahead:  # a whole model of its own, unless it lies on another GPU
        return (0, 0, False) if rollout.device_offset else (shape.parameters * decoded.dtype_bytes, copies, True)
    cast = decoded.dtype_bytes != shape.dtype_bytes
    return (decoded.dtype_bytes * shape.parameters if cast else 0), copies, False


def decoded_shape(config: RunConfig, shape: ModelShape) -> ModelShape:
    """The shape in the precision that the rollout decodes in, which is its cache's too."""
    return dataclasses.replace(shape, dtype_bytes=2) if config.rollout.decode_dtype() == "bfloat16" else shape


def sampling_footprint(
    config: RunConfig, shape: ModelShape, load: RankLoad, *, room: int, memory: int, gathered: int, on_gpu: bool,
    slack: float,
) -> dict[str, int]:  # fmt: skip
    """``kv_cache``, and ``sampling``: the cache and all that comes and goes beside it, but for :func:`sampler_bytes`.

    ``room`` is what is left of ``memory`` beside what is held and the weights that sampling adds. ``gathered`` are
    weights that ZeRO 3 makes whole. vLLM takes its cache in a single piece.
    """
    rollout = config.rollout
    if isinstance(rollout, VllmRolloutConfig):
        cache = _vllm_cache(rollout, shape, load, room)
        return {"kv_cache": cache, "sampling": cache}
    if rollout.ahead and rollout.device_offset:
        return {"kv_cache": 0, "sampling": 0}  # on the other GPU
    decoded, left = decoded_shape(config, shape), room - gathered
    wanted, group = wanted_tokens(load, on_gpu=on_gpu), group_tokens(load)
    limit, most, kept_free = None, None, 0
    if isinstance(rollout, LocalRolloutConfig):
        limit, most = _limit(rollout, decoded, left, memory, on_gpu=on_gpu), rollout.prefix_tokens_per_pass
        kept_free = _kept_free(rollout, decoded, memory) if on_gpu else 0
    tokens = wanted if limit is None else min(wanted, max(limit, group))
    cache = cache_bytes(decoded, tokens)
    transient = cache + sampling_bytes(decoded, load, tokens_per_pass=most)
    transient += round(slack * transient)
    if limit is not None and limit < group:  # the decoder refuses to start
        transient = max(transient, decoded.kv_bytes(group) + kept_free)
    return {"kv_cache": cache, "sampling": transient + gathered}


def wanted_tokens(load: RankLoad, *, on_gpu: bool) -> int:
    """Each prompt once, and each completion in flight at full length.

    The cache grows by 16 columns on a CPU and by a quarter on a GPU, as the decoder's does.
    """
    columns = 0
    while columns < load.new_tokens:
        columns = grown(columns, "cuda" if on_gpu else "cpu")
    return load.prompts * load.prompt_tokens + load.completions * columns


def group_tokens(load: RankLoad) -> int:
    """A single group at full length, without which the decoder does not start."""
    return load.prompt_tokens + -(-load.completions // load.prompts) * load.new_tokens


def cache_bytes(shape: ModelShape, tokens: int) -> int:
    """Keys and values of ``tokens``, and one layer of them again while the cache grows."""
    held = shape.kv_bytes(tokens)
    return held + held // shape.layers


def sampling_bytes(shape: ModelShape, load: RankLoad, *, tokens_per_pass: int | None = None) -> int:
    """Beside the cache: the larger of the prefill and a decoding step's logits, fp32 probabilities and their sums.

    The prefill takes ``tokens_per_pass`` at a time (None: all), or one prompt.
    """
    prompts = load.prompts * load.prompt_tokens
    prompts = prompts if tokens_per_pass is None else min(prompts, max(tokens_per_pass, load.prompt_tokens))
    prefill = prompts * (4 * shape.hidden_size + 3 * shape.intermediate_size)
    step = load.completions * shape.vocabulary * (shape.dtype_bytes + 2 * FP32_BYTES)
    return max(prefill * shape.dtype_bytes, step)


def vllm_cache_bytes(shape: ModelShape, load: RankLoad, room: int) -> int:
    """vLLM's cache: what the rows in flight need at full length, at most what is left, at least a single completion."""
    longest = load.prompt_tokens + load.new_tokens
    wanted = shape.kv_bytes(min(load.completions, VLLM_ROWS) * longest)
    return min(wanted, max(room, shape.kv_bytes(longest)))


def _vllm_cache(rollout: VllmRolloutConfig, shape: ModelShape, load: RankLoad, room: int) -> int:
    if rollout.mode == "server":
        return 0
    if rollout.cache_gib or not rollout.sleep:
        return round((rollout.cache_gib or CACHE_GIB) * GIB)
    return vllm_cache_bytes(shape, load, room)


def _limit(rollout: LocalRolloutConfig, shape: ModelShape, left: int, memory: int, *, on_gpu: bool) -> int | None:
    """Tokens that the decoder lets its cache have."""
    return bounded_tokens(
        configured=rollout.max_cache_tokens,
        rows=rollout.max_rows,
        free=round(left - RESERVE_SHARE * memory) if on_gpu else None,
        vocabulary=shape.vocabulary,
        token_bytes=shape.kv_bytes(1),
    )


def _kept_free(rollout: LocalRolloutConfig, shape: ModelShape, memory: int) -> int:
    """What the decoder leaves to others when it bounds its cache: logits of all rows, and a tenth of the device."""
    return rollout.max_rows * shape.vocabulary * LOGITS_BYTES + round(RESERVE_SHARE * memory)
