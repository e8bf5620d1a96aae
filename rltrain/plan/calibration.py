"""The row of this machine's CPU in the device table, measured in a few seconds with layers of the model itself.

A model of few layers is timed at two depths, so that a layer's share is their difference: forward and backward of a
micro-batch, and a step of the decoder. The rates are those that the formulas of :mod:`rltrain.plan.time` then need.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from rltrain.config import ModelConfig
from rltrain.plan.devices import Device
from rltrain.plan.model_shape import PROBED_LAYERS, ModelShape, build, with_depth
from rltrain.plan.time import LAYER_VECTORS, Work, attention_flop
from rltrain.policy.logprobs import inference
from rltrain.rollout.local import decoder_kinds

COPY_BYTES = 2**26
LEAST_S = 0.3
LEAST_CALL_S = 1e-6
DECODED_TOKENS = 16


def seconds_of(run: Callable[[], object], *, clock: Callable[[], float] = time.process_time) -> float:
    """The fastest of repeated calls within ``LEAST_S`` seconds, by the process's own CPU time."""
    run()
    taken: list[float] = []
    end = clock() + LEAST_S
    while not taken or clock() < end:
        start = clock()
        run()
        taken.append(clock() - start)
    return min(taken)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds_of(lambda: target.copy_(source))


def layer_seconds(config: ModelConfig, architecture: Any, time_of: Callable[[Any], float]) -> float:
    """A layer's part in ``time_of(model)``: the difference between two depths. A single layer is the whole model."""
    layers = architecture.get_text_config().num_hidden_layers
    if layers == 1:
        return time_of(build(config, architecture, device="cpu"))
    few, more = PROBED_LAYERS if layers >= PROBED_LAYERS[1] else (1, layers)
    seconds = [time_of(build(config, with_depth(architecture, depth), device="cpu")) for depth in (few, more)]
    return max(0.0, seconds[1] - seconds[0]) / (more - few)


def training_pass(model: Any, *, rows: int, tokens: int) -> float:
    """Seconds of forward and backward of the decoder over ``rows x tokens``."""
    ids_BT = torch.zeros(rows, tokens, dtype=torch.long)

    def run() -> None:
        hidden_BTD = model.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state
        hidden_BTD.backward(torch.ones_like(hidden_BTD))

    return seconds_of(run)


def decoding_step(model: Any, work: Work) -> float:
    """Seconds of a token of all rows in flight, in the middle of their completions, by the fastest local decoder."""
    groups = -(-work.in_flight // work.group_size)
    decoder = decoder_kinds(model.eval(), pad_id=0)[0].make(round(work.new_tokens))
    with inference(model):
        decoder.admit([[1] * round(work.prompt_tokens)] * groups, work.group_size)
        tokens_B = torch.ones(groups * work.group_size, dtype=torch.long)
        for _ in range(round(work.new_tokens / 2) - DECODED_TOKENS):
            decoder.step(tokens_B)
        return min(seconds_once(lambda: decoder.step(tokens_B)) for _ in range(DECODED_TOKENS))


def seconds_once(run: Callable[[], object]) -> float:
    """CPU seconds of a single call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def this_cpu(
    config: ModelConfig, architecture: Any, shape: ModelShape, work: Work, *, rows: int, tokens: int
) -> Device:
    """This machine at this model's sizes, micro-batches of ``rows x tokens``. Shares are 1: the rates are reached."""
    plain = dataclasses.replace(config, gradient_checkpointing=False)
    bandwidth = copy_bandwidth()
    layer = (shape.parameters - shape.vocabulary * shape.hidden_size * (1 if shape.tied else 2)) / shape.layers
    trained = layer_seconds(plain, architecture, lambda model: training_pass(model, rows=rows, tokens=tokens))
    moved = 3 * LAYER_VECTORS * shape.hidden_size * rows * tokens * shape.dtype_bytes / bandwidth
    flop = 6.0 * layer * rows * tokens + 3 * attention_flop(shape, rows * tokens, tokens / 2) / shape.layers
    rate = flop / max(trained - moved, 0.2 * trained)
    stepped = layer_seconds(plain, architecture, lambda model: decoding_step(model, work))
    products = 2.0 * layer * work.in_flight / rate
    return Device(
        name="cpu",
        memory_gib=0.0,
        bf16_flops=rate,
        fp32_flops=rate,
        bandwidth=bandwidth,
        node_link=1e9,
        network=1e9,
        train_share=1.0,
        prefill_share=1.0,
        bandwidth_share=1.0,
        link_share=1.0,
        call_s=max(stepped - products, LEAST_CALL_S),
        graph_call_s=max(stepped - products, LEAST_CALL_S),
        decode_flops=rate,
        adam_bytes=100.0,  # torch's AdamW on a CPU makes a temporary of every operation
    )
