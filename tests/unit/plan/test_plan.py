"""The planner: bytes counted by hand, parameters counted in real models, activations between two ways of counting."""

import json

import pytest
import torch
from tiny_run import config as tiny_run

from rltrain import cli
from rltrain.errors import ConfigError
from rltrain.plan import memory
from rltrain.plan.__main__ import cluster_of, report
from rltrain.plan.memory import Cluster, Footprint, RankLoad, ShardingPlan
from rltrain.plan.model_shape import ModelShape, PeakBytes, _probe, activation_bytes, architecture, measure
from rltrain.policy.load import load_policy

T = 1_000_000
BF16 = ModelShape(
    trainable=T, frozen=0, largest=1000, vocabulary=100, hidden_size=64, intermediate_size=128, layers=2, kv_heads=3,
    head_dim=4, dtype_bytes=2,
)  # fmt: skip
LOAD = RankLoad(
    rows=2, tokens=30, loss_tokens=40, micro_batches=2, prompts=1, prompt_tokens=10, completions=4, new_tokens=20
)


def footprint(stage: int, *, ranks: int = 1, shape: ModelShape = BF16, offload: bool = False, **options) -> Footprint:
    config = cli.compose([])
    sharding = ShardingPlan(zero_stage=stage, offload_optimizer=offload, gradient_checkpointing=False)
    return memory.footprint(config, shape, LOAD, sharding, ranks=ranks, activations=7, **options)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_mixed_precision_with_adam_takes_16_bytes_a_parameter(stage):
    found = footprint(stage)
    assert (found.weights, found.gradients, found.optimizer) == (2 * T, 2 * T, 12 * T)


@pytest.mark.parametrize(("stage", "weights", "gradients", "optimizer"), [
    (0, 2 * T, 2 * T, 12 * T),
    (1, 2 * T, 2 * T, 3 * T),
    (2, 2 * T, T // 2, 3 * T),
    (3, T // 2, T // 2, 3 * T),
])  # fmt: skip
def test_four_ranks_share_what_the_stage_says(stage, weights, gradients, optimizer):
    found = footprint(stage, ranks=4)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)


def test_fp32_has_a_second_copy_of_its_weights_above_stage_0_alone():
    shape = ModelShape(**{**vars(BF16), "dtype_bytes": 4})
    plain, sharded = footprint(0, shape=shape), footprint(1, shape=shape)
    assert plain.weights + plain.gradients + plain.optimizer == 16 * T
    assert sharded.weights + sharded.gradients + sharded.optimizer == 20 * T


def test_offloading_moves_the_states_to_the_host_with_the_gradients_they_are_stepped_with():
    found = footprint(2, ranks=4, offload=True)
    assert (found.optimizer, found.step, found.host) == (0, 0, 3 * T + T)


def test_zero_3_keeps_live_weights_and_gathers_all_to_sample():
    found = footprint(3, ranks=4)
    assert found.buffers == 2 * memory.BUCKET_ELEMENTS + 2 * T
    assert found.sampling == 2 * T + found.kv_cache + memory.sampling_bytes(BF16, LOAD)


def test_frozen_weights_of_adapters_have_no_gradient_and_no_state():
    shape = ModelShape(**{**vars(BF16), "trainable": 1000, "frozen": T})
    found = footprint(1, ranks=2, shape=shape)
    assert (found.weights, found.gradients, found.optimizer) == (2 * (T + 1000), 2000, 6000)


def test_keys_and_values_by_hand():
    assert BF16.kv_bytes(5) == 2 * 2 * 3 * 4 * 2 * 5
    # One prompt of 10 tokens, four completions of 20 in columns of 16, and one of two layers again while growing.
    assert memory.kv_cache_bytes(BF16, LOAD) == BF16.kv_bytes(10 + 4 * 32) * 3 // 2


def test_the_logits_that_are_avoided():
    assert memory.naive_logits_bytes(BF16, 40) == 3 * 40 * 100 * 4


def test_the_peak_is_the_busiest_of_training_stepping_and_sampling():
    parts = {"weights": 10, "optimizer": 20, "frozen": 5, "gradients": 4, "activations": 50, "head": 6, "buffers": 3}
    parts |= {"step": 8, "kv_cache": 30, "host": 0}
    assert Footprint(**parts, sampling=40, accumulates=True).peak == 35 + 4 + 50 + 6 + 3
    assert Footprint(**parts, sampling=40, accumulates=False).peak == 35 + 50 + 6 + 3
    assert Footprint(**parts, sampling=90, accumulates=True).peak == 35 + 90


def test_the_load_of_a_rank():
    overrides = ["sampling.max_prompt_tokens=32", "sampling.max_new_tokens=48", "batch.token_budget=1000"]
    overrides += ["batch.prompts_per_step=16", "batch.group_size=8", "evaluation.problems=500", "rollout.max_rows=100"]
    assert memory.rank_load(cli.compose(overrides), 2) == RankLoad(
        rows=12, tokens=80, loss_tokens=576, micro_batches=6, prompts=100, prompt_tokens=32, completions=100,
        new_tokens=48,
    )  # fmt: skip


def test_frozen_models_are_the_reference_and_the_scorers():
    assert memory.frozen_bytes(cli.compose([]), BF16) == 0
    assert memory.frozen_bytes(cli.compose(["loss.kl_coef=0.1"]), BF16) == 2 * T
    assert memory.frozen_bytes(cli.compose(["loss.kl_coef=0.1"]), BF16, weight_share=4) == T // 2
    rlp = ["+experiment=rlp", "scorer.kind=ema"]
    assert memory.frozen_bytes(cli.compose(rlp), BF16) == 4 * T


def test_parameters_are_those_of_the_model_that_is_trained(tmp_path):
    config = tiny_run(tmp_path, "model.lora.rank=4").model
    shape = measure(config, architecture(config))
    real = list(load_policy(config).model.parameters())
    assert shape.trainable == sum(p.numel() for p in real if p.requires_grad) == 2 * 4 * 4 * (32 + 32)
    assert shape.frozen == sum(p.numel() for p in real if not p.requires_grad)
    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.dtype_bytes) == (2, 2, 16, 4)


def test_a_folder_with_a_config_and_no_weights_is_enough(tmp_path):
    config = tiny_run(tmp_path).model
    architecture(config).save_pretrained(tmp_path / "folder")
    there = cli.compose(["model=pretrained", f"model.path={tmp_path / 'folder'}"]).model
    assert measure(there, architecture(there)) == measure(config, architecture(config))


def test_storages_are_counted_from_their_making_to_their_end():
    given = torch.zeros(100)
    with PeakBytes() as counted:
        first = given * 2
        second = first + 1
        given.view(10, 10).add_(1)
        assert (counted.live, counted.peak) == (800, 800)
        del first
        assert (counted.live, counted.peak) == (400, 800)
        third = second.view(10, 10).T
        assert counted.live == 400
        del second, third
    assert counted.live == 0


def test_layers_that_are_not_run_are_extrapolated(tmp_path):
    config = tiny_run(tmp_path, "model.layers=6").model
    shape = architecture(config)
    for checkpointing in (False, True):
        whole = _probe(config, shape, rows=4, tokens=16, checkpointing=checkpointing)
        assert activation_bytes(config, shape, rows=4, tokens=16, checkpointing=checkpointing) == whole


def test_checkpointing_keeps_one_input_a_layer(tmp_path):
    """One more layer costs its input, rows x tokens x hidden, and no more."""
    config = tiny_run(tmp_path).model
    few, more = (architecture(tiny_run(tmp_path, f"model.layers={layers}").model) for layers in (3, 4))
    sizes = [_probe(config, shape, rows=4, tokens=16, checkpointing=True) for shape in (few, more)]
    assert sizes[1] - sizes[0] == 4 * 16 * 32 * 4


def test_the_command_prints_every_sharding_plan_and_marks_the_chosen_one(tmp_path, capsys):
    cluster, rest = cluster_of(["nodes=2", "gpus_per_node=2", "gpu_gib=16", "steps=3"])
    assert cluster == Cluster(nodes=2, gpus_per_node=2, gpu_gib=16)
    assert rest == ["steps=3"]
    run_config = tiny_run(tmp_path, "deepspeed.zero_stage=2")
    report(run_config, cluster=cluster, as_text=False)
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["layouts"]) == 14
    (chosen,) = [row for row in printed["layouts"] if row["chosen"]]
    assert (chosen["zero_stage"], chosen["offload_optimizer"], chosen["fits"]) == (2, False, True)
    report(run_config, cluster=cluster, as_text=True)
    assert "2*" in capsys.readouterr().out


def test_mistakes_name_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match="nodes=two: not a number; set for example nodes=8"):
        cluster_of(["nodes=two"])
    with pytest.raises(ConfigError, match="gpu_gib=-1.0: must be > 0"):
        cluster_of(["gpu_gib=-1"])
    with pytest.raises(ConfigError, match="batch.prompts_per_step=4: not divisible by 3 ranks"):
        memory.plan(tiny_run(tmp_path), Cluster(gpus_per_node=3))
