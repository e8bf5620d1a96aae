"""Memory per rank under every ZeRO stage, from the config alone: no weights are read, and no GPU is needed.

The assumptions are in docs/planner.md, predicted against measured peaks in docs/results/planner.md.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rltrain.config import Need, RunConfig
from rltrain.errors import require, require_one_of
from rltrain.plan.devices import DEVICES, GIB
from rltrain.plan.load import RankLoad, rank_load
from rltrain.plan.model_shape import FP32_BYTES, ModelShape, activation_bytes, architecture, measure
from rltrain.plan.sampling import sampler_bytes, sampling_footprint
from rltrain.policy.load import PretrainedConfig

STATE_BYTES = 12  # of AdamW, a parameter: an fp32 copy of the weight and two moments
# Of DeepSpeed: elements of a gradient bucket, and of weights that ZeRO 3 keeps gathered at most.
BUCKET_ELEMENTS = 500_000_000
LIVE_ELEMENTS = 1_000_000_000
LOADING_THREADS = 4  # of transformers, each with a tensor
# CUDA's context and NCCL's buffers.
RESERVE_GIB = 2.0
# Of what comes and goes on a GPU, activations, logits and cache: the blocks that its caching allocator cannot join.
ALLOCATOR_SLACK = 0.06
SMALL_LOGITS = 2**20  # the most with which the head takes the plain path (rltrain.kernels)
BLOCK_LOGITS = 2**20
BLOCK_COLUMNS = 1024  # at least
TRITON_COLUMNS = 8192  # of rltrain.kernels.triton: BACKWARD_COLUMNS, and the programs of a forward
TRITON_SPLITS = 512


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines. A GPU is one rank; ``gpu_gib`` is its memory, 0 for what ``device`` has.

    ``prompt_tokens`` and ``new_tokens`` are the mean lengths that the time is estimated for; 0 for the limits.
    """

    nodes: int = 1
    gpus_per_node: int = 1
    gpu_gib: float = 0.0
    device: str = "H100"
    prompt_tokens: int = 0
    new_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)}: must be > 0")
        for name in ("gpu_gib", "prompt_tokens", "new_tokens"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: must be >= 0; 0 is the default")
        require_one_of((*DEVICES, "cpu"), "device", self.device)
        if not self.gpu_gib:
            object.__setattr__(self, "gpu_gib", DEVICES[self.device].memory_gib if self.device in DEVICES else 80.0)

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class ShardingPlan:
    """How training state is spread over the ranks, and whether activations are recomputed."""

    zero_stage: int
    offload_optimizer: bool
    gradient_checkpointing: bool


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes per rank under one sharding plan. ``host`` is the memory of the node that offloading takes, per rank.

    ``weights``, ``optimizer``, ``frozen`` (reference, scorer) and ``sampler`` are always held. ``sampler`` is what a
    rollout keeps while the rank trains: a second copy of the weights, a vLLM engine's resident part, or all of it.
    On top comes the largest of three stages: training (gradients, activations, head, buffers), the optimiser step, and
    sampling (cache and logits). With ``concurrent`` sampling goes on while the rank trains. Sampling needs another copy
    of the weights under ZeRO 3, with ``rollout.dtype`` or by vLLM. ``slack`` is what the allocator cannot use while the
    rank trains.
    """

    weights: int
    gradients: int
    optimizer: int
    frozen: int
    activations: int
    head: int
    buffers: int
    step: int
    sampling: int
    kv_cache: int
    host: int
    accumulates: bool
    sampler: int = 0
    slack: int = 0
    concurrent: bool = False

    @property
    def held(self) -> int:
        """What is always there."""
        return self.weights + self.optimizer + self.frozen + self.sampler

    @property
    def peak(self) -> int:
        backward = self.activations + self.head + self.slack
        # With a single micro-batch, gradients are made while activations are freed.
        training = self.gradients + backward if self.accumulates else max(self.gradients, backward)
        busiest = max(training + self.buffers, self.gradients + self.step)
        busiest = busiest + self.sampling if self.concurrent else max(busiest, self.sampling)
        return self.held + busiest


def head_bytes(shape: ModelShape, loss_tokens: int, *, on_gpu: bool = False) -> int:
    """The fused head: hidden states and their gradient, blocks of logits, and dW before it joins the gradient.

    On a GPU Triton keeps dlogits [N, 8192] in the model's precision, and four statistics a split of the vocabulary.
    """
    states = 2 * loss_tokens * shape.hidden_size * FP32_BYTES
    logits = loss_tokens * shape.vocabulary
    weight = shape.vocabulary * shape.hidden_size * shape.dtype_bytes
    # The plain path holds logits, log-probs, probabilities, their product and gradients.
    if logits <= SMALL_LOGITS:
        return states + 6 * logits * FP32_BYTES + weight
    if not on_gpu:
        return states + 2 * max(BLOCK_LOGITS, BLOCK_COLUMNS * loss_tokens) * FP32_BYTES + weight
    columns = min(TRITON_COLUMNS, shape.vocabulary)
    splits = -(-TRITON_SPLITS // max(1, loss_tokens // 64))
    return states + loss_tokens * (columns * shape.dtype_bytes + (4 * splits + 5) * FP32_BYTES) + weight


def attention_bytes(shape: ModelShape, load: RankLoad, *, checkpointing: bool, on_gpu: bool) -> int:
    """What attention holds beside the counted activations, in all layers, or in one with checkpointing.

    Packed attention copies queries, keys and values into rows, and repeats grouped heads in fp32. torch's math kernel
    on a GPU, which takes the padded rows of grouped heads in fp32, holds scores and probabilities [heads, Q, K].
    """
    layers = 1 if checkpointing else shape.layers
    queries = load.packed_tokens if load.gathered_tokens else 0
    repeats = on_gpu and shape.heads != shape.kv_heads and shape.dtype_bytes == FP32_BYTES
    heads = shape.heads if repeats else shape.kv_heads
    gathered = (2 * shape.heads * queries + 2 * heads * load.gathered_tokens) * shape.head_dim
    scores = 2 * load.rows * shape.heads * load.tokens**2 if repeats and not load.gathered_tokens else 0
    return layers * (gathered + scores) * shape.dtype_bytes


def naive_logits_bytes(shape: ModelShape, loss_tokens: int) -> int:
    """The memory of an unfused head: three fp32 copies of [N, V]."""
    return 3 * loss_tokens * shape.vocabulary * FP32_BYTES


def frozen_bytes(config: RunConfig, shape: ModelShape, *, weight_share: int = 1) -> int:
    """The reference in the weights' precision, and phi of the scorer. An EMA is whole and fp32 on every rank."""
    needs, whole = config.needs(), shape.parameters * shape.dtype_bytes
    reference = whole // weight_share if Need.REFERENCE_LOGPROBS in needs else 0
    if Need.SCORER not in needs or config.scorer.kind == "policy":
        return reference
    if config.scorer.kind == "ema":
        return reference + shape.parameters * FP32_BYTES
    shared = reference and config.scorer.path == config.reference and config.scorer.cold_start.steps == 0
    return reference + (0 if shared else whole)


def optimizer_bytes(shape: ModelShape, stage: int, share: int) -> int:
    """AdamW's two fp32 moments and its fp32 copy of the weights. fp32 weights at stage 0 need no copy."""
    has_master = stage > 0 or shape.dtype_bytes != FP32_BYTES
    return (STATE_BYTES if has_master else STATE_BYTES - FP32_BYTES) * shape.trainable // share


def buffer_bytes(config: RunConfig, shape: ModelShape, stage: int, *, on_gpu: bool) -> int:
    """DeepSpeed's gradient bucket above stage 0, and the weights that stage 3 keeps gathered while it trains."""
    if stage == 0:
        return 0
    options = config.deepspeed.extra.get("zero_optimization", {})
    bucket = options.get("reduce_bucket_size", BUCKET_ELEMENTS)
    live = min(shape.parameters, options.get("stage3_max_live_parameters", LIVE_ELEMENTS)) if stage == 3 else 0
    return ((bucket if on_gpu else min(bucket, shape.trainable)) + live) * shape.dtype_bytes


def step_bytes(shape: ModelShape, stage: int, share: int, *, on_gpu: bool) -> int:
    """Temporary memory of the optimiser step.

    AdamW's arithmetic is on one parameter at stage 0 on a CPU, else on the whole shard. Where AdamW steps a copy of
    the weights, the gradient is copied too. At stage 0 DeepSpeed first flattens the gradients, even on a single rank.
    """
    shard = shape.trainable // share
    has_master = stage > 0 or shape.dtype_bytes != FP32_BYTES
    temporaries = shard if on_gpu else 2 * (shard if has_master else shape.largest)
    arithmetic = (temporaries + (shard if has_master else 0)) * FP32_BYTES
    return arithmetic if stage else max(arithmetic, min(shard, BUCKET_ELEMENTS) * shape.dtype_bytes)


def footprint(
    config: RunConfig,
    shape: ModelShape,
    load: RankLoad,
    sharding: ShardingPlan,
    *,
    ranks: int,
    activations: int,
    memory: float = 1e18,
    on_gpu: bool = True,
) -> Footprint:
    """The bytes under one sharding plan, as ZeRO has it (1910.02054): 16 per parameter with bf16 weights and AdamW.

    ``memory`` is the card's, which bounds the rollout's cache.
    """
    stage, offload = sharding.zero_stage, sharding.offload_optimizer
    share = ranks if stage else 1
    whole = shape.parameters * shape.dtype_bytes
    states = optimizer_bytes(shape, stage, share)
    sampler, sampling_weights, concurrent = sampler_bytes(config, shape)
    made = Footprint(
        weights=whole // ranks if stage == 3 else whole,
        gradients=shape.trainable * gradient_element_bytes(config, shape) // (share if stage >= 2 else 1),
        optimizer=0 if offload else states,
        frozen=frozen_bytes(config, shape, weight_share=ranks if stage == 3 else 1),
        activations=activations,
        head=head_bytes(shape, load.loss_tokens, on_gpu=on_gpu),
        buffers=buffer_bytes(config, shape, stage, on_gpu=on_gpu),
        step=0 if offload else step_bytes(shape, stage, share, on_gpu=on_gpu),
        sampling=0,
        kv_cache=0,
        accumulates=load.micro_batches > 1,
        host=states + shape.trainable // share * FP32_BYTES if offload else 0,
        sampler=sampler,
        concurrent=concurrent,
    )
    slack = ALLOCATOR_SLACK if on_gpu else 0.0
    sampled = sampling_footprint(
        config,
        shape,
        load,
        room=round(memory - RESERVE_GIB * GIB) - made.held - sampling_weights,
        memory=round(memory),
        gathered=whole if stage == 3 and not config.rollout.ahead else 0,
        on_gpu=on_gpu,
        slack=slack,
    )
    sampled["sampling"] += sampling_weights
    return dataclasses.replace(made, slack=round(slack * (made.activations + made.head)), **sampled)


def gradient_element_bytes(config: RunConfig, shape: ModelShape) -> int:
    """An element of the gradients that micro-batches add up in: fp32 where ``data_types.grad_accum_dtype`` says so."""
    accumulated = config.deepspeed.extra.get("data_types", {}).get("grad_accum_dtype")
    return FP32_BYTES if accumulated == "fp32" else shape.dtype_bytes


def loading_bytes(config: RunConfig, shape: ModelShape, *, on_gpu: bool) -> int:
    """The most of a node's own memory that a rank takes while it loads the policy, beside pages of the files.

    A GGUF file is unpacked in fp32. A folder is loaded straight to a GPU, by threads that hold a tensor each; any other
    source is made whole on the host, as on a CPU.
    """
    if isinstance(config.model, PretrainedConfig) and config.model.gguf_file:
        return shape.parameters * FP32_BYTES
    if not on_gpu or not isinstance(config.model, PretrainedConfig):
        return shape.parameters * shape.dtype_bytes
    rows = [shape.vocabulary] * (1 if shape.tied else 2) + [shape.intermediate_size] * LOADING_THREADS
    largest = sorted(rows, reverse=True)[:LOADING_THREADS]
    return sum(largest) * shape.hidden_size * shape.dtype_bytes


def sharding_plans(stages: Sequence[int] = (0, 1, 2, 3)) -> list[ShardingPlan]:
    """Every stage, with and without offload (which needs shards) and gradient checkpointing."""
    return [
        ShardingPlan(zero_stage=stage, offload_optimizer=offload, gradient_checkpointing=checkpointing)
        for stage in stages
        for offload in ((False, True) if stage else (False,))
        for checkpointing in (False, True)
    ]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The footprints of a config on a cluster, by sharding plan; ``loading`` is :func:`loading_bytes`, of a rank."""

    cluster: Cluster
    shape: ModelShape
    load: RankLoad
    chosen: ShardingPlan
    footprints: dict[ShardingPlan, Footprint]
    loading: int

    def fits(self, sharding: ShardingPlan) -> bool:
        """Whether the peak fits, with RESERVE_GIB left for what is not counted."""
        return self.footprints[sharding].peak <= (self.cluster.gpu_gib - RESERVE_GIB) * GIB


def plan(config: RunConfig, cluster: Cluster, *, on_gpu: bool = True) -> Plan:
    """The footprint of every sharding plan. On a CPU, buffers that are not written take no memory."""
    ranks = cluster.ranks
    require(
        config.batch.prompts_per_step % ranks == 0,
        f"batch.prompts_per_step={config.batch.prompts_per_step}: not divisible by {ranks} ranks; set a multiple",
    )
    source = architecture(config.model)
    shape, load = measure(config.model, source), rank_load(config, ranks)
    activations = {
        checkpointing: activation_bytes(
            config.model, source, rows=load.rows, tokens=load.tokens, checkpointing=checkpointing
        )
        * max(load.packed_tokens, load.rows * load.tokens)
        // (load.rows * load.tokens)
        + attention_bytes(shape, load, checkpointing=checkpointing, on_gpu=on_gpu)
        for checkpointing in (False, True)
    }
    footprints = {
        sharding: footprint(
            config,
            shape,
            load,
            sharding,
            ranks=ranks,
            activations=activations[sharding.gradient_checkpointing],
            memory=cluster.gpu_gib * GIB,
            on_gpu=on_gpu,
        )
        for sharding in sharding_plans()
    }
    chosen = ShardingPlan(
        zero_stage=config.deepspeed.zero_stage,
        offload_optimizer=config.deepspeed.offload_optimizer,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    return Plan(
        cluster=cluster,
        shape=shape,
        load=load,
        chosen=chosen,
        footprints=footprints,
        loading=loading_bytes(config, shape, on_gpu=on_gpu),
    )


def as_json(made: Plan, times: Mapping[int, Any] | None = None) -> str:
    """The plan as JSON, in bytes; ``times`` are those of :mod:`rltrain.plan.time`, by number of ranks, in seconds."""
    rows = [
        {
            **vars(sharding),
            **vars(footprint),
            "peak": footprint.peak,
            "fits": made.fits(sharding),
            "chosen": sharding == made.chosen,
        }
        for sharding, footprint in made.footprints.items()
    ]
    facts = {"cluster": made.cluster, "shape": made.shape, "work": made.load}
    avoided = naive_logits_bytes(made.shape, made.load.loss_tokens)
    return json.dumps(
        {**facts, "logits_avoided": avoided, "loading": made.loading, "layouts": rows, "times": times or {}},
        indent=1,
        default=dataclasses.asdict,
    )
