"""Seconds of each stage of a step, from the config, the model's numbers and a device's rates.

Every rank has the same share of the step. Stages follow one another; a collective is not hidden behind a backward pass.

    decode     waves · new tokens · (max(bytes / bandwidth, FLOP / peak) + layers · call) + prefill
    training   FLOP / (peak · share), with 6 FLOP a weight and token, 8 with activation checkpointing
    optimiser  bytes of AdamW's state and gradients / bandwidth
    ZeRO       bytes on the wire / link
    push       bytes of the weights / link

The assumptions are in docs/planner.md, estimated against measured steps of a CPU in docs/results/planner.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rltrain.config import Need, RunConfig
from rltrain.errors import require
from rltrain.plan.devices import Device
from rltrain.plan.memory import Cluster, gradient_element_bytes
from rltrain.plan.model_shape import FP32_BYTES, ModelShape
from rltrain.plan.sampling import VLLM_ROWS
from rltrain.rollout.local import LocalRolloutConfig
from rltrain.rollout.vllm import VllmRolloutConfig

MOST_RANKS = 1024
FILE_BYTES_A_S = 1e9  # of storage that all nodes share, over which weights go to servers in files
SAMPLE_PASSES = 6  # over a row of fp32 logits: softmax, sum, comparison
HEAD_PASSES = 8  # over the logits of a token with a loss, forward and backward
LAYER_VECTORS = 40  # of hidden size that norms, rotations and sums of a layer move a token, forward
STEP_LAYERS = 2  # the calls of embedding, head and sampling, counted as those of layers


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds by stage, in the order of a step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def dominant(self) -> str:
        """The stage that takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one rank does in a step. ``prompt_tokens`` and ``new_tokens`` are means of a completion."""

    prompts: int
    group_size: int
    in_flight: int
    prompt_tokens: float
    new_tokens: float
    micro_batches: int
    updates: int

    @property
    def completions(self) -> int:
        return self.prompts * self.group_size

    @property
    def loss_tokens(self) -> float:
        return self.completions * self.new_tokens

    @property
    def tokens(self) -> float:
        """Of prompts and completions, each prompt with each of its completions."""
        return self.completions * (self.prompt_tokens + self.new_tokens)


def work_of(config: RunConfig, cluster: Cluster) -> Work:
    """A rank's share. Lengths are the limits, unless the cluster's ``prompt_tokens`` and ``new_tokens`` are set."""
    sampling, batch = config.sampling, config.batch
    prompts = -(-batch.prompts_per_step // cluster.ranks)
    prompt_tokens = cluster.prompt_tokens or sampling.max_prompt_tokens
    new_tokens = cluster.new_tokens or sampling.max_new_tokens
    completions = prompts * batch.group_size
    most = min(completions, VLLM_ROWS) if isinstance(config.rollout, VllmRolloutConfig) else completions
    return Work(
        prompts=prompts,
        group_size=batch.group_size,
        in_flight=config.rollout.rows_in_flight(most),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        micro_batches=math.ceil(completions * (prompt_tokens + new_tokens) / batch.token_budget),
        updates=batch.updates,
    )


def body_weights(shape: ModelShape) -> int:
    """The weights that multiply every token: all but embeddings and head."""
    return shape.parameters - (1 if shape.tied else 2) * shape.vocabulary * shape.hidden_size


def attention_flop(shape: ModelShape, queries: float, mean_keys: float) -> float:
    """Scores and weighted values in all layers: ``4 · L · H · d`` a pair of a query and a key."""
    return 4.0 * shape.layers * shape.heads * shape.head_dim * queries * mean_keys


def forward_flop(shape: ModelShape, work: Work) -> float:
    """The decoder's forward over all tokens, a causal half of the pairs, and the head over tokens with a loss."""
    length = work.prompt_tokens + work.new_tokens
    body = 2.0 * body_weights(shape) * work.tokens
    head = 2.0 * shape.vocabulary * shape.hidden_size * work.loss_tokens
    return body + head + attention_flop(shape, work.tokens, length / 2)


def decode_seconds(shape: ModelShape, work: Work, device: Device, *, dtype_bytes: int, graph: bool) -> float:
    """All completions of a rank, in waves of the rows in flight; a step reads all weights and the rows' cache."""
    rows = work.in_flight
    weights = (body_weights(shape) + shape.vocabulary * shape.hidden_size) * dtype_bytes
    columns = work.prompt_tokens / work.group_size + work.new_tokens / 2  # a group reads its prompt once
    cache = rows * columns * shape.kv_bytes(1) / shape.dtype_bytes * dtype_bytes
    logits = SAMPLE_PASSES * rows * shape.vocabulary * FP32_BYTES
    flop = 2.0 * weights / dtype_bytes * rows + attention_flop(shape, rows, work.prompt_tokens + work.new_tokens / 2)
    peak = device.decode_flops or device.flops(dtype_bytes) * device.prefill_share
    moved = (weights + cache) / (device.bandwidth * device.bandwidth_share)
    step = max(moved, flop / peak) + logits / (device.bandwidth * device.bandwidth_share)
    step += (shape.layers + STEP_LAYERS) * (device.graph_call_s if graph else device.call_s)
    prefill = 2.0 * body_weights(shape) * work.prompts * work.prompt_tokens
    prefill += attention_flop(shape, work.prompts * work.prompt_tokens, work.prompt_tokens / 2)
    waves = math.ceil(work.completions / rows)
    return waves * work.new_tokens * step + prefill / (device.flops(dtype_bytes) * device.prefill_share)


def training_seconds(shape: ModelShape, work: Work, device: Device, *, checkpointing: bool) -> float:
    """Forward and backward of all tokens, ``updates`` times counted by epochs; elementwise work by its bytes."""
    passes = 4 if checkpointing else 3
    flop = passes * forward_flop(shape, work)
    flop += 2.0 * shape.vocabulary * shape.hidden_size * work.loss_tokens * (0 if checkpointing else 1)  # logits twice
    vectors = passes * LAYER_VECTORS * shape.layers * shape.hidden_size * work.tokens * shape.dtype_bytes
    logits = HEAD_PASSES * shape.vocabulary * work.loss_tokens * FP32_BYTES
    moved = (vectors + logits) / (device.bandwidth * device.bandwidth_share)
    return flop / (device.flops(shape.dtype_bytes) * device.train_share) + moved


def zero_bytes(config: RunConfig, shape: ModelShape, work: Work, ranks: int) -> float:
    """Bytes that a rank sends a step: ``(R-1)/R`` of reduced gradients and gathered weights (1910.02054, section 7)."""
    stage, share = config.deepspeed.zero_stage, (ranks - 1) / ranks
    gradients = shape.trainable * min(gradient_element_bytes(config, shape), shape.dtype_bytes)
    weights = shape.parameters * shape.dtype_bytes
    if stage <= 1:
        return 2.0 * gradients * share * work.updates
    reduced = gradients * work.micro_batches * share
    if stage == 2:
        return reduced + weights * share * work.updates
    gathered = (2 + bool(config.model.gradient_checkpointing)) * weights * work.micro_batches
    return reduced + (gathered + weights) * share  # and once whole for the rollout


def push_seconds(config: RunConfig, shape: ModelShape, device: Device, cluster: Cluster) -> float:
    """New weights into the sampler: a copy on the device, or to servers over the network or through shared files."""
    weights = shape.parameters * shape.dtype_bytes
    if not isinstance(config.rollout, VllmRolloutConfig):
        return 2 * weights / device.bandwidth if config.rollout.ahead else 0.0
    if config.rollout.mode == "colocated":
        return 2 * weights / (device.bandwidth * device.bandwidth_share)
    if config.rollout.weights == "files":
        return 2 * weights / FILE_BYTES_A_S
    return weights / device.link(max(2, cluster.nodes))


def estimate(config: RunConfig, shape: ModelShape, device: Device, cluster: Cluster) -> Times:
    """Seconds of each stage of a step. A server's decode is as if each rank had a server of its kind to itself."""
    require(cluster.ranks <= MOST_RANKS, f"nodes x gpus_per_node={cluster.ranks}: the estimate goes to {MOST_RANKS}")
    work = work_of(config, cluster)
    by_vllm = isinstance(config.rollout, VllmRolloutConfig)
    low = config.rollout.decode_dtype() == "bfloat16"
    local = isinstance(config.rollout, LocalRolloutConfig) and config.rollout.cuda_graph == "auto"
    graph = by_vllm or (local and shape.graphs)
    decode = decode_seconds(shape, work, device, dtype_bytes=2 if low else shape.dtype_bytes, graph=graph)
    forward = forward_flop(shape, work) / (device.flops(shape.dtype_bytes) * device.prefill_share)
    forwards = (Need.REFERENCE_LOGPROBS in config.needs()) + (work.updates > 1 and (by_vllm or low))
    epochs = config.batch.update_epochs
    checkpointing = config.model.gradient_checkpointing
    shard = shape.trainable / (cluster.ranks if config.deepspeed.zero_stage else 1)
    return Times(
        seconds={
            "decode": decode,
            "log-probs": forwards * forward,
            "training": epochs * training_seconds(shape, work, device, checkpointing=checkpointing),
            "ZeRO": zero_bytes(config, shape, work, cluster.ranks) / device.link(cluster.nodes),
            "optimiser": work.updates * device.adam_bytes * shard / (device.bandwidth * device.bandwidth_share),
            "weight push": push_seconds(config, shape, device, cluster),
        }
    )
