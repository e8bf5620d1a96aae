"""The planner: bytes counted by hand, parameters counted in real models, activations between two ways of counting."""

import dataclasses
import json

import pytest
import torch
from tiny_run import config as tiny_run

from rltrain import cli
from rltrain.errors import ConfigError
from rltrain.plan import memory, sampling
from rltrain.plan.__main__ import cluster_of, report
from rltrain.plan.devices import GIB
from rltrain.plan.load import RankLoad, rank_load
from rltrain.plan.memory import Cluster, Footprint, ShardingPlan
from rltrain.plan.model_shape import ModelShape, PeakBytes, _probe, activation_bytes, architecture, build, measure
from rltrain.policy.load import load_policy
from rltrain.rollout.llama_step import LlamaStep

T = 1_000_000
BF16 = ModelShape(
    trainable=T, frozen=0, largest=1000, vocabulary=100, hidden_size=64, intermediate_size=128, layers=2,
    heads=6, kv_heads=3, head_dim=4, dtype_bytes=2, tied=True,
)  # fmt: skip
LOAD = RankLoad(
    rows=2,
    tokens=30,
    packed_tokens=60,
    gathered_tokens=0,
    loss_tokens=40,
    micro_batches=2,
    prompts=1,
    prompt_tokens=10,
    completions=4,
    new_tokens=20,
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
    assert found.sampling == 2 * T + round(1.06 * (found.kv_cache + sampling.sampling_bytes(BF16, LOAD)))


def test_frozen_weights_of_adapters_have_no_gradient_and_no_state():
    shape = ModelShape(**{**vars(BF16), "trainable": 1000, "frozen": T})
    found = footprint(1, ranks=2, shape=shape)
    assert (found.weights, found.gradients, found.optimizer) == (2 * (T + 1000), 2000, 6000)


def test_keys_and_values_by_hand():
    assert BF16.kv_bytes(5) == 2 * 2 * 3 * 4 * 2 * 5
    # One prompt of 10 tokens, four completions of 20 in columns of 16, and one of two layers again while growing.
    assert sampling.wanted_tokens(LOAD, on_gpu=False) == 10 + 4 * 32
    assert sampling.cache_bytes(BF16, 10 + 4 * 32) == BF16.kv_bytes(10 + 4 * 32) * 3 // 2
    # A GPU's cache has 64 columns at first, then 80, 112 and so on: a quarter more, in blocks of 16.
    assert sampling.wanted_tokens(LOAD, on_gpu=True) == 10 + 4 * 64
    longer = dataclasses.replace(LOAD, new_tokens=81)
    assert sampling.wanted_tokens(longer, on_gpu=True) == 10 + 4 * 112


def of_local(*overrides: str, memory_bytes: int, load: RankLoad = LOAD, shape: ModelShape = BF16) -> Footprint:
    """ZeRO 0 of a million parameters: 14 MB of weights and moments, and 2 GiB that are no one's."""
    sharding = ShardingPlan(zero_stage=0, offload_optimizer=False, gradient_checkpointing=False)
    config = cli.compose(list(overrides))
    return memory.footprint(config, shape, load, sharding, ranks=1, activations=7, memory=memory_bytes)


def test_a_local_cache_takes_what_the_decoder_lets_it():
    """3 prompts of 10 tokens and 12 completions in 64 columns are 798 tokens of 96 bytes; a group of 4 takes 90."""
    many = dataclasses.replace(LOAD, prompts=3, completions=12)
    wide = dataclasses.replace(BF16, layers=1000)  # so that a token takes 48 kB, and the growing layer little
    token = wide.kv_bytes(1)
    assert (token, sampling.wanted_tokens(many, on_gpu=True), sampling.group_tokens(many)) == (48_000, 798, 90)

    def tokens(memory_bytes: int, *overrides: str) -> float:
        cache = of_local(*overrides, memory_bytes=memory_bytes, load=many, shape=wide).kv_cache
        return cache * 1000 / (1001 * token)

    # A tenth of the device, 2 GiB, 14 MB and the logits of 256 rows, 16 bytes each, stay free: 100 tokens are left.
    taken = 2 * GIB + 14 * T + 256 * 100 * 16
    device = round((taken + 100 * token) / 0.9) + 1
    assert tokens(device) == 100
    assert tokens(device + token) == 100 and tokens(device + 2 * token) == 101
    assert tokens(100 * GIB) == 798
    assert tokens(100 * GIB, "rollout.max_cache_tokens=300") == 300
    assert tokens(device, "rollout.max_cache_tokens=300") == 100
    # Logits of more rows, 64 kB each.
    assert tokens(device, "rollout.max_rows=286") == 99
    # On a CPU there is no limit but the configured one.
    config = cli.compose(["rollout.max_cache_tokens=300"])
    options = {"room": 0, "memory": 0, "gathered": 0, "on_gpu": False, "slack": 0.0}
    assert sampling.sampling_footprint(config, wide, many, **options)["kv_cache"] == 300 * token * 1001 // 1000


def test_a_cache_without_room_for_a_group_does_not_fit():
    """The decoder would refuse to start, although the group itself has a place in the tenth that it keeps free."""
    wide = dataclasses.replace(BF16, layers=1000)
    taken, group = 2 * GIB + 14 * T + 256 * 100 * 16, 90 * 48_000
    device = round((taken + group) / 0.9)
    for size, fits in ((device + 48_000, True), (device - 48_000, False)):
        found = of_local(memory_bytes=size, shape=wide)
        assert found.kv_cache == group * 1001 // 1000
        assert (found.peak <= size - 2 * GIB) == fits


def test_a_cache_of_another_precision_than_the_weights():
    fp32 = dataclasses.replace(BF16, dtype_bytes=4)
    half, whole = (
        of_local(f"rollout.dtype={dtype}", memory_bytes=100 * GIB, shape=fp32) for dtype in ("bfloat16", "policy")
    )
    assert whole.kv_cache == 2 * half.kv_cache == 2 * sampling.cache_bytes(BF16, 10 + 4 * 64)


def test_the_prefill_goes_in_passes():
    many = dataclasses.replace(LOAD, prompts=30, completions=1)
    each = (4 * 64 + 3 * 128) * 2
    assert sampling.sampling_bytes(BF16, many) == 300 * each
    assert sampling.sampling_bytes(BF16, many, tokens_per_pass=64) == 64 * each
    assert sampling.sampling_bytes(BF16, many, tokens_per_pass=4) == 10 * each


def test_weights_that_the_decoder_makes_are_those_that_it_holds(tmp_path):
    """LoRA on q and the down projection of 2 layers with hidden size 32, 2 kv heads of 16, MLP 64.

    Q, K and V are stacked together; merged are the down projections. The weights of the norms of 2 + 2 heads of 16 lie
    in a row, and the eps of each norm.
    """
    targets = "model.lora.target_modules=[q_proj,down_proj]"
    config = tiny_run(tmp_path, "model.lora.rank=4", targets).model
    source = architecture(config)
    attention, mlp = 32 * (32 + 2 * 2 * 16), 32 * source.intermediate_size
    norms = 2 * (2 + 2) * 16 + 2 * 3 + 1
    assert measure(config, source).decode_copies == 2 * (attention + mlp) + norms
    real = load_policy(config).model
    with PeakBytes() as counted:
        step = LlamaStep(real.get_base_model(), lambda *_: torch.zeros(0))
        assert counted.live == 4 * (2 * (attention + mlp) + norms)
    del step


def test_merged_lora_is_there_while_sampling():
    shape = dataclasses.replace(BF16, decode_copies=5000)
    plain, merged = (of_local(memory_bytes=100 * GIB, shape=one) for one in (BF16, shape))
    assert merged.sampling == plain.sampling + 2 * 5000 and merged.held == plain.held
    sleeping = of_rollout("rollout=vllm")
    assert of_rollout("rollout=vllm", shape=shape).sampling == sleeping.sampling
    ahead, alone = (of_rollout("rollout.ahead=true", shape=one) for one in (shape, BF16))
    assert (ahead.sampler, ahead.sampling) == (alone.sampler, alone.sampling + 2 * 5000)


def test_the_logits_that_are_avoided():
    assert memory.naive_logits_bytes(BF16, 40) == 3 * 40 * 100 * 4


def test_the_peak_is_the_busiest_of_training_stepping_and_sampling():
    parts = {"weights": 10, "optimizer": 20, "frozen": 5, "gradients": 4, "activations": 50, "head": 6, "buffers": 3}
    parts |= {"step": 8, "kv_cache": 30, "host": 0}
    assert Footprint(**parts, sampling=40, accumulates=True).peak == 35 + 4 + 50 + 6 + 3
    assert Footprint(**parts, sampling=40, accumulates=False).peak == 35 + 50 + 6 + 3
    assert Footprint(**parts, sampling=90, accumulates=True).peak == 35 + 90


@pytest.mark.parametrize(("overrides", "on_gpu", "expected"), [
    (["model=pretrained", "model.path=some/model"], True, 4 * 128 * 64 * 2),  # four threads, each a matrix of the MLP
    (["model=pretrained", "model.path=some/model"], False, 2 * T),
    (["model=pretrained", "model.path=some/model", "model.gguf_file=a.gguf"], True, 4 * T),
    ([], True, 2 * T),  # the built-in model is made on the host
])  # fmt: skip
def test_host_memory_while_loading(overrides, on_gpu, expected):
    assert memory.loading_bytes(cli.compose(overrides), BF16, on_gpu=on_gpu) == expected


def test_embeddings_and_head_are_the_largest_of_four_tensors():
    config = cli.compose(["model=pretrained", "model.path=some/model"])
    for tied, rows in ((True, 1000 + 3 * 128), (False, 2 * 1000 + 2 * 128)):
        shape = dataclasses.replace(BF16, vocabulary=1000, tied=tied)
        assert memory.loading_bytes(config, shape, on_gpu=True) == rows * 64 * 2


def test_the_load_of_a_rank():
    overrides = ["sampling.max_prompt_tokens=32", "sampling.max_new_tokens=48", "batch.token_budget=1000"]
    overrides += ["batch.prompts_per_step=16", "batch.group_size=8", "evaluation.problems=500", "rollout.max_rows=100"]
    assert rank_load(cli.compose(overrides), 2) == RankLoad(
        rows=12, tokens=80, packed_tokens=960, gathered_tokens=0, loss_tokens=576, micro_batches=6,
        prompts=100, prompt_tokens=32, completions=100, new_tokens=48,
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


def test_activations_of_adapters_are_those_of_the_model_that_is_trained(tmp_path):
    """Counted under fake tensors and in a real forward and backward of the loaded model."""
    config = tiny_run(tmp_path, "model.lora.rank=4")
    real = load_policy(config.model).model.train()
    for parameter in real.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with PeakBytes() as counted:
        hidden_BTD = real.get_decoder()(
            input_ids=torch.zeros(4, 16, dtype=torch.long), use_cache=False
        ).last_hidden_state  # fmt: skip
        hidden_BTD.backward(torch.ones_like(hidden_BTD))
    found = _probe(config.model, architecture(config.model), rows=4, tokens=16, checkpointing=False)
    assert found == pytest.approx(counted.peak, rel=0.03)  # a hidden state more under fake tensors, 8 of 325 kB
    assert memory.plan(config, Cluster()).shape.trainable == 2 * 4 * 4 * (32 + 32)


def test_adapters_take_the_precision_of_the_model(tmp_path):
    config = tiny_run(tmp_path, "model.lora.rank=4", "model.dtype=bfloat16").model
    made = [one for one in build(config, architecture(config), device="cpu").parameters() if one.requires_grad]
    assert {(one.dtype, one.device.type) for one in made} == {(torch.bfloat16, "cpu")}


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
    out = capsys.readouterr().out
    assert "2*" in out
    # Two GPUs a node, each with the built-in model of 25 thousand weights in fp32.
    assert "loading takes up to 0.0 GiB beside the files' pages" in out
    assert printed["loading"] == 4 * measure(run_config.model, architecture(run_config.model)).parameters


def test_mistakes_name_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match="nodes=two: not a number; set for example nodes=8"):
        cluster_of(["nodes=two"])
    with pytest.raises(ConfigError, match="gpu_gib=-1.0: must be >= 0"):
        cluster_of(["gpu_gib=-1"])
    with pytest.raises(ConfigError, match="batch.prompts_per_step=4: not divisible by 3 ranks"):
        memory.plan(tiny_run(tmp_path), Cluster(gpus_per_node=3))


def test_gradients_that_add_up_in_fp32_take_4_bytes_an_element():
    assert memory.gradient_element_bytes(cli.compose([]), BF16) == 2
    assert memory.gradient_element_bytes(cli.compose(["deepspeed=one_node"]), BF16) == 4


def test_vllms_cache_is_what_is_wanted_or_what_is_left_but_holds_a_completion():
    wanted, single = BF16.kv_bytes(4 * 30), BF16.kv_bytes(30)
    assert sampling.vllm_cache_bytes(BF16, LOAD, 10**9) == wanted
    assert sampling.vllm_cache_bytes(BF16, LOAD, wanted - 1) == wanted - 1
    assert sampling.vllm_cache_bytes(BF16, LOAD, -5) == single


def of_rollout(*overrides: str, shape: ModelShape = BF16) -> Footprint:
    sharding = ShardingPlan(zero_stage=1, offload_optimizer=False, gradient_checkpointing=False)
    return memory.footprint(
        cli.compose(list(overrides)), shape, LOAD, sharding, ranks=2, activations=7, memory=80 * GIB
    )


def test_what_a_sampler_holds():
    asleep, awake = of_rollout("rollout=vllm"), of_rollout("rollout=vllm", "rollout.sleep=false")
    assert (asleep.sampler, asleep.sampling) == (2 * GIB, asleep.kv_cache + 2 * T)
    assert (awake.sampler, awake.sampling, awake.concurrent) == (2 * GIB + 2 * T, 2 * GIB, True)
    server = of_rollout("rollout=vllm", "rollout.mode=server", "rollout.urls=[http://a:1]")
    assert (server.sampler, server.sampling) == (0, 0)
    ahead, elsewhere = of_rollout("rollout.ahead=true"), of_rollout("rollout.ahead=true", "rollout.device_offset=1")
    assert (ahead.sampler, ahead.concurrent) == (2 * T, True)
    assert (elsewhere.sampler, elsewhere.sampling, elsewhere.concurrent) == (0, 0, False)


def test_sampling_while_training_adds_up():
    parts = {"weights": 10, "optimizer": 20, "frozen": 5, "gradients": 4, "activations": 50, "head": 6, "buffers": 3}
    parts |= {"step": 8, "kv_cache": 30, "host": 0, "sampler": 7, "slack": 2}
    apart = Footprint(**parts, sampling=40, accumulates=True)
    assert apart.peak == 35 + 7 + 4 + 50 + 6 + 2 + 3
    assert Footprint(**parts, sampling=40, accumulates=True, concurrent=True).peak == apart.peak + 40


@pytest.mark.parametrize(
    ("packing", "packed", "gathered", "loss"),
    # 100 tokens hold three rows of 30, or five of packed tokens, or a prompt of 10 and four of its completions of 20.
    [("padded", 90, 0, 60), ("auto", 90, 0, 60), ("packed", 100, 100, 70), ("shared", 90, 10 + 4 * 30, 80)],
)
def test_tokens_of_a_micro_batch_in_every_layout(packing, packed, gathered, loss):
    overrides = ["sampling.max_prompt_tokens=10", "sampling.max_new_tokens=20", "batch.token_budget=100"]
    overrides += ["batch.prompts_per_step=2", "batch.group_size=4", f"batch.packing={packing}"]
    load = rank_load(cli.compose(overrides), 1)
    assert (load.packed_tokens, load.gathered_tokens, load.loss_tokens) == (packed, gathered, loss)


def test_attention_that_gathers_rows_and_attention_by_the_math_kernel():
    packed = dataclasses.replace(LOAD, packed_tokens=60, gathered_tokens=90)
    options = {"checkpointing": False, "on_gpu": True}
    assert memory.attention_bytes(BF16, LOAD, **options) == 0
    # Queries and results of 6 heads, keys and values of 3, 4 elements each, in 2 layers of 2 bytes.
    gathered = (2 * 6 * 60 + 2 * 3 * 90) * 4
    assert memory.attention_bytes(BF16, packed, **options) == 2 * gathered * 2
    assert memory.attention_bytes(BF16, packed, **options | {"checkpointing": True}) == gathered * 2
    # In fp32 no fused kernel takes grouped heads: scores and probabilities [6, 30, 30] of 2 rows.
    wide = dataclasses.replace(BF16, dtype_bytes=4)
    assert memory.attention_bytes(wide, LOAD, **options) == 2 * 2 * 2 * 6 * 900 * 4
    assert memory.attention_bytes(wide, LOAD, **options | {"on_gpu": False}) == 0


def test_tritons_buffers_are_a_block_of_dlogits_and_statistics_of_the_splits():
    shape = dataclasses.replace(BF16, vocabulary=100_000)
    states, weight = 2 * 640 * 64 * 4, 100_000 * 64 * 2
    splits = 52  # 512 programs over 10 blocks of 64 rows
    expected = states + 640 * (8192 * 2 + (4 * splits + 5) * 4) + weight
    assert memory.head_bytes(shape, 640, on_gpu=True) == expected
