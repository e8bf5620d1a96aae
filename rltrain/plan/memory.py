"""Memory per rank under every ZeRO stage, from the config alone: no weights are read, and no GPU is needed.

The assumptions are in docs/planner.md, predicted against measured peaks in docs/results/planner.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rltrain.config import Need, RunConfig
from rltrain.errors import require
from rltrain.plan.model_shape import ModelShape, activation_bytes, architecture, measure

GIB = 2**30
STATE_BYTES = 12  # of AdamW, a parameter: an fp32 copy of the weight and two moments
FP32_BYTES = 4
# Of DeepSpeed: elements of a gradient bucket, and of weights that ZeRO 3 keeps gathered at most.
BUCKET_ELEMENTS = 500_000_000
LIVE_ELEMENTS = 1_000_000_000
# CUDA's context, NCCL's buffers and what the allocator cannot use.
RESERVE_GIB = 2.0
SMALL_LOGITS = 2**20  # the most with which the head takes the plain path (rltrain.kernels)
BLOCK_LOGITS = 2**20
BLOCK_COLUMNS = 1024  # at least
CACHE_BLOCK = 16  # tokens by which the rollout's cache grows


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines. ``gpu_gib`` is the memory of a GPU, which is one rank."""

    nodes: int = 1
    gpus_per_node: int = 1
    gpu_gib: float = 80.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(value > 0, f"{name}={value}: must be > 0")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class RankLoad:
    """The largest amounts that a rank handles at once: a micro-batch, and the completions in flight."""

    rows: int
    tokens: int
    loss_tokens: int
    micro_batches: int
    prompts: int
    prompt_tokens: int
    completions: int
    new_tokens: int


@dataclass(frozen=True, kw_only=True)
class ShardingPlan:
    """How training state is spread over the ranks, and whether activations are recomputed."""

    zero_stage: int
    offload_optimizer: bool
    gradient_checkpointing: bool


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes per rank under one sharding plan. ``host`` is the memory of the node that offloading takes, per rank.

    ``weights``, ``optimizer`` and ``frozen`` (reference, scorer) are always held. On top comes the largest of three
    stages: training (gradients, activations, head, buffers), the optimiser step, and sampling (cache and logits).
    Sampling needs another copy of the weights under ZeRO 3 or with ``rollout.dtype``.
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

    @property
    def peak(self) -> int:
        backward = self.activations + self.head
        # With a single micro-batch, gradients are made while activations are freed.
        training = self.gradients + backward if self.accumulates else max(self.gradients, backward)
        busiest = max(training + self.buffers, self.gradients + self.step, self.sampling)
        return self.weights + self.optimizer + self.frozen + busiest


def rank_load(config: RunConfig, ranks: int) -> RankLoad:
    """The load of full-length prompts and completions, the largest that the limits allow."""
    sampling, batch = config.sampling, config.batch
    longest = sampling.max_prompt_tokens + sampling.max_new_tokens
    prompts = -(-batch.prompts_per_step // ranks)
    completions = prompts * batch.group_size
    rows = min(completions, batch.token_budget // longest)
    evaluation = config.evaluation
    held_out = -(-evaluation.problems // ranks) * evaluation.samples if evaluation.every_steps else 0
    in_flight = config.rollout.rows_in_flight(max(completions, held_out))
    share = batch.group_size if completions >= held_out else evaluation.samples
    return RankLoad(
        rows=rows,
        tokens=longest,
        loss_tokens=rows * sampling.max_new_tokens,
        micro_batches=-(-completions // rows),
        prompts=-(-in_flight // share),
        prompt_tokens=sampling.max_prompt_tokens,
        completions=in_flight,
        new_tokens=sampling.max_new_tokens,
    )


def head_bytes(shape: ModelShape, loss_tokens: int) -> int:
    """The fused head: hidden states and their gradient, blocks of logits, and dW before it joins the gradient."""
    states = 2 * loss_tokens * shape.hidden_size * FP32_BYTES
    logits = loss_tokens * shape.vocabulary
    # The plain path holds logits, log-probs, probabilities, their product and gradients.
    blocks = 6 * logits if logits <= SMALL_LOGITS else 2 * max(BLOCK_LOGITS, BLOCK_COLUMNS * loss_tokens)
    return states + blocks * FP32_BYTES + shape.vocabulary * shape.hidden_size * shape.dtype_bytes


def naive_logits_bytes(shape: ModelShape, loss_tokens: int) -> int:
    """The memory of an unfused head: three fp32 copies of [N, V]."""
    return 3 * loss_tokens * shape.vocabulary * FP32_BYTES


def kv_cache_bytes(shape: ModelShape, load: RankLoad) -> int:
    """The cache holds each prompt once and each completion at full length, and copies one layer while it grows."""
    columns = math.ceil(load.new_tokens / CACHE_BLOCK) * CACHE_BLOCK
    held = shape.kv_bytes(load.prompts * load.prompt_tokens + load.completions * columns)
    return held + held // shape.layers


def sampling_bytes(shape: ModelShape, load: RankLoad) -> int:
    """Beside the cache: the larger of the prefill and a decoding step's logits, fp32 probabilities and their sums."""
    prefill = load.prompts * load.prompt_tokens * (4 * shape.hidden_size + 3 * shape.intermediate_size)
    step = load.completions * shape.vocabulary * (shape.dtype_bytes + 2 * FP32_BYTES)
    return max(prefill * shape.dtype_bytes, step)


def frozen_bytes(config: RunConfig, shape: ModelShape, *, weight_share: int = 1) -> int:
    """The reference in the weights' precision, and phi of the scorer. An EMA is whole and fp32 on every rank."""
    needs, whole = config.needs(), shape.parameters * shape.dtype_bytes
    reference = whole // weight_share if Need.REFERENCE_LOGPROBS in needs else 0
    if Need.SCORER not in needs or config.scorer.kind == "policy":
        return reference
    if config.scorer.kind == "ema":
        return reference + shape.parameters * FP32_BYTES
    shared = reference and config.scorer.path == config.reference
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
    on_gpu: bool = True,
) -> Footprint:
    """The bytes under one sharding plan, as ZeRO has it (1910.02054): 16 per parameter with bf16 weights and AdamW."""
    stage, offload = sharding.zero_stage, sharding.offload_optimizer
    share = ranks if stage else 1
    whole = shape.parameters * shape.dtype_bytes
    states, kv_cache = optimizer_bytes(shape, stage, share), kv_cache_bytes(shape, load)
    decodes_in_bf16 = config.rollout.decode_dtype() == "bfloat16" and shape.dtype_bytes != 2
    return Footprint(
        weights=(whole // ranks if stage == 3 else whole) + (2 * shape.parameters if decodes_in_bf16 else 0),
        gradients=shape.trainable * shape.dtype_bytes // (share if stage >= 2 else 1),
        optimizer=0 if offload else states,
        frozen=frozen_bytes(config, shape, weight_share=ranks if stage == 3 else 1),
        activations=activations,
        head=head_bytes(shape, load.loss_tokens),
        buffers=buffer_bytes(config, shape, stage, on_gpu=on_gpu),
        step=0 if offload else step_bytes(shape, stage, share, on_gpu=on_gpu),
        sampling=kv_cache + sampling_bytes(shape, load) + (whole if stage == 3 else 0),
        kv_cache=kv_cache,
        accumulates=load.micro_batches > 1,
        host=states + shape.trainable // share * FP32_BYTES if offload else 0,
    )


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
    """The footprints of a config on a cluster, by sharding plan."""

    cluster: Cluster
    shape: ModelShape
    load: RankLoad
    chosen: ShardingPlan
    footprints: dict[ShardingPlan, Footprint]

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
            on_gpu=on_gpu,
        )
        for sharding in sharding_plans()
    }
    chosen = ShardingPlan(
        zero_stage=config.deepspeed.zero_stage,
        offload_optimizer=config.deepspeed.offload_optimizer,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    return Plan(cluster=cluster, shape=shape, load=load, chosen=chosen, footprints=footprints)


def as_json(made: Plan) -> str:
    """The plan as JSON, in bytes."""
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
    return json.dumps({**facts, "logits_avoided": avoided, "layouts": rows}, indent=1, default=dataclasses.asdict)
