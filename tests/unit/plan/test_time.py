"""The estimate of seconds: each stage by hand on a device of round numbers, and what it says of clusters."""

import dataclasses
import json

import pytest
from tiny_run import config as tiny_run

from rltrain import cli
from rltrain.errors import ConfigError
from rltrain.plan import time
from rltrain.plan.__main__ import report, wider
from rltrain.plan.calibration import this_cpu
from rltrain.plan.devices import DEVICES, Device
from rltrain.plan.memory import Cluster
from rltrain.plan.model_shape import ModelShape, architecture, measure

# Head and embedding, tied: 10 x 4 of 140 weights, so 100 in a body of 2 layers. A key and a value of 2 heads: 8 bytes.
SHAPE = ModelShape(
    trainable=140, frozen=0, largest=40, vocabulary=10, hidden_size=4, intermediate_size=8, layers=2, heads=2,
    kv_heads=1, head_dim=2, dtype_bytes=2, tied=True,
)  # fmt: skip
WORK = time.Work(
    prompts=2, group_size=2, in_flight=4, prompt_tokens=6, new_tokens=4, micro_batches=3, updates=1
)  # fmt: skip
ROUND = Device(
    name="round", memory_gib=1, bf16_flops=1e3, fp32_flops=1e2, bandwidth=1e3, node_link=100.0, network=10.0,
    train_share=0.5, prefill_share=1.0, bandwidth_share=0.5, link_share=1.0, call_s=0.25, graph_call_s=0.0,
)  # fmt: skip


def test_flop_of_a_forward():
    # 40 tokens through 100 weights; 16 with a loss through a head of 40; pairs of 40 queries and 5 keys in 2 layers.
    assert time.forward_flop(SHAPE, WORK) == 2 * 100 * 40 + 2 * 40 * 16 + 4 * 2 * 2 * 2 * 40 * 5


def test_training_is_three_forwards_and_the_logits_once_more_or_four_forwards():
    forward = time.forward_flop(SHAPE, WORK)
    vectors, logits = 40 * 2 * 4 * 40 * 2, 8 * 10 * 16 * 4  # bytes of a forward, and of both ways
    kept = (3 * forward + 2 * 40 * 16) / 500 + (3 * vectors + logits) / 500
    assert time.training_seconds(SHAPE, WORK, ROUND, checkpointing=False) == pytest.approx(kept)
    again = 4 * forward / 500 + (4 * vectors + logits) / 500
    assert time.training_seconds(SHAPE, WORK, ROUND, checkpointing=True) == pytest.approx(again)


def test_decoding_reads_the_weights_and_the_cache_in_every_step():
    # Four rows: FLOP 2·140·4 + attention of 4 rows over 8 keys, 4·2·2·2·32, at 1000; bytes 280 and a cache of 4 rows
    # of 6/2 + 4/2 tokens at 16 bytes, at 500. Then the logits, 6·4·10·4 bytes, and the calls of 2 + 2 layers.
    step = max((2 * 140 * 4 + 32 * 32) / 1000, (280 + 4 * 5 * 16) / 500) + 960 / 500 + 4 * 0.25
    prefill = (2 * 100 * 12 + 32 * 12 * 3) / 1000
    assert SHAPE.kv_bytes(1) == 16
    found = time.decode_seconds(SHAPE, WORK, ROUND, dtype_bytes=2, graph=False)
    assert found == pytest.approx(4 * step + prefill)
    assert time.decode_seconds(SHAPE, WORK, ROUND, dtype_bytes=2, graph=True) == pytest.approx(found - 4 * 4 * 0.25)
    half = dataclasses.replace(WORK, in_flight=2)
    fewer = max((2 * 140 * 2 + 32 * 16) / 1000, (280 + 2 * 5 * 16) / 500) + 480 / 500 + 1.0
    assert time.decode_seconds(SHAPE, half, ROUND, dtype_bytes=2, graph=False) == pytest.approx(8 * fewer + prefill)


@pytest.mark.parametrize(("stage", "sent"), [
    (0, 2 * 280),  # an all-reduce of gradients
    (1, 2 * 280),
    (2, 3 * 280 + 280),  # a reduction a micro-batch, and the new weights
    (3, 3 * 280 + 3 * 2 * 280 + 280),  # each micro-batch gathers twice, and the rollout once
])  # fmt: skip
def test_bytes_on_the_wire_of_every_stage(stage, sent):
    config = cli.compose([f"deepspeed.zero_stage={stage}"])
    assert time.zero_bytes(config, SHAPE, WORK, 4) == pytest.approx(sent * 3 / 4)
    assert time.zero_bytes(config, SHAPE, WORK, 1) == 0


@pytest.mark.parametrize(("overrides", "seconds"), [
    ([], 0.0),  # the policy itself
    (["rollout.ahead=true"], 2 * 280 / 1e3),
    (["rollout=vllm"], 2 * 280 / 500),
    (["rollout=vllm", "rollout.mode=server", "rollout.urls=[http://a:1]"], 280 / 10),
    (["rollout=vllm", "rollout.mode=server", "rollout.urls=[http://a:1]", "rollout.weights=files"], 560 / 1e9),
])  # fmt: skip
def test_weights_to_the_sampler(overrides, seconds):
    assert time.push_seconds(cli.compose(overrides), SHAPE, ROUND, Cluster()) == pytest.approx(seconds)


def test_a_collective_over_nodes_goes_at_the_slowest_link():
    assert (ROUND.link(1), ROUND.link(2)) == (100.0, 10.0)
    assert DEVICES["H100"].link(2) == 0.7 * 50e9


def test_a_step_is_the_sum_of_its_stages_and_names_the_longest():
    config = cli.compose(["+experiment=quickstart", "loss.kl_coef=0.1"])
    found = time.estimate(config, SHAPE, DEVICES["H200"], Cluster(gpus_per_node=8, new_tokens=20))
    assert list(found.seconds) == ["decode", "log-probs", "training", "ZeRO", "optimiser", "weight push"]
    assert found.total == sum(found.seconds.values()) and found.seconds[found.dominant] == max(found.seconds.values())
    assert found.seconds["log-probs"] > 0


def test_a_llama_shaped_model_is_decoded_by_graphs_unless_they_are_off():
    device, graphed = DEVICES["H200"], dataclasses.replace(SHAPE, graphs=True)

    def decode(shape, *overrides):
        config = cli.compose(["rollout=local", *overrides])
        steps = time.work_of(config, Cluster(new_tokens=20))
        return time.estimate(config, shape, device, Cluster(new_tokens=20)).seconds["decode"], steps

    slow, work = decode(SHAPE)
    calls = -(-work.completions // work.in_flight) * 20 * 4 * (600e-6 - 25e-6)
    assert decode(graphed)[0] == pytest.approx(slow - calls)
    assert decode(graphed, "rollout.cuda_graph=off")[0] == slow


def test_up_to_1024_ranks_in_nodes_of_eight():
    sizes = dict(wider(Cluster(nodes=3, gpus_per_node=4)))
    assert sorted(sizes) == [1, 2, 4, 8, 12, 16, 32, 64, 128, 256, 512, 1024]
    assert (sizes[1024].nodes, sizes[1024].gpus_per_node, sizes[12].nodes) == (128, 8, 3)
    with pytest.raises(ConfigError, match="nodes x gpus_per_node=2048: the estimate goes to 1024"):
        time.estimate(cli.compose([]), SHAPE, ROUND, Cluster(nodes=256, gpus_per_node=8))


def test_twice_the_ranks_take_half_the_training_while_there_are_prompts():
    config = cli.compose(["batch.prompts_per_step=16"])
    one, two = (time.estimate(config, SHAPE, ROUND, Cluster(gpus_per_node=n)).seconds["training"] for n in (1, 2))
    assert one == pytest.approx(2 * two)


def test_this_cpu_is_measured_at_the_models_sizes(tmp_path):
    """A rate that the formulas turn back into the seconds of the layer: more tokens take longer, never no time."""
    config = tiny_run(tmp_path)
    shape, work = measure(config.model, architecture(config.model)), time.work_of(config, Cluster(device="cpu"))
    found = this_cpu(config.model, architecture(config.model), shape, work, rows=4, tokens=16)
    assert found.bandwidth > 1e8 and found.call_s > 0 and 1e6 < found.fp32_flops < 1e13
    times = time.estimate(config, shape, found, Cluster(device="cpu"))
    longer = time.estimate(config, shape, found, Cluster(device="cpu", new_tokens=20))
    assert 0 < times.seconds["decode"] < longer.seconds["decode"]


def test_the_command_prints_seconds_beside_bytes(tmp_path, capsys):
    cluster = Cluster(device="A100", nodes=2, gpus_per_node=2)
    report(tiny_run(tmp_path), cluster=cluster, as_text=False)
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["times"]) >= {"1", "4", "1024"} and printed["times"]["4"]["seconds"]["decode"] > 0
    report(tiny_run(tmp_path), cluster=cluster, as_text=True)
    out = capsys.readouterr().out
    assert "seconds a step by stage, A100" in out and "4*" in out


def test_devices_are_named():
    with pytest.raises(ConfigError, match="device=B300: unknown; set one of H200, H100, A100, L40S, 4090, cpu"):
        Cluster(device="B300")
    assert Cluster(device="L40S").gpu_gib == 44 and Cluster(device="L40S", gpu_gib=40).gpu_gib == 40
