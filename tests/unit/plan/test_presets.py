"""The presets for GPUs: what they resolve to, and that the planner's model of each fits the card it is written for."""

import pytest

from rltrain import cli
from rltrain.engine.deepspeed import deepspeed_dict
from rltrain.plan.memory import Cluster, ShardingPlan, plan
from rltrain.plan.model_shape import architecture, measure

PARAMETERS = {"gsm8k_qwen": 596_049_920, "math_qwen_node": 8_190_735_360}  # of the models' cards


@pytest.mark.parametrize(
    ("experiment", "stage", "checkpointing", "prompts"),
    [("gsm8k_qwen", 1, False, 64), ("math_qwen_node", 2, True, 128)],
)
def test_a_preset_is_complete(experiment, stage, checkpointing, prompts):
    config = cli.compose([f"+experiment={experiment}"])
    assert (config.model.dtype, config.model.gradient_checkpointing) == ("bfloat16", checkpointing)
    assert (config.deepspeed.zero_stage, config.rollout.zero_stage) == (stage, stage)
    assert (config.rollout.mode, config.loss.importance_correction) == ("colocated", "truncate")
    assert config.batch.prompts_per_step == prompts
    made = deepspeed_dict(config.deepspeed, config.optimizer, dtype=config.model.dtype)
    assert made["data_types"] == {"grad_accum_dtype": "fp32"} and made["bf16"] == {"enabled": True}


@pytest.mark.parametrize("experiment", PARAMETERS)
def test_the_planner_knows_the_models_of_the_presets_without_a_network(experiment):
    model = cli.compose([f"+experiment={experiment}"]).model
    shape = measure(model, architecture(model))
    assert shape.trainable == PARAMETERS[experiment] and (shape.vocabulary, shape.kv_heads) == (151936, 8)


@pytest.mark.parametrize(
    ("experiment", "gpus", "without"),
    [("gsm8k_qwen", 1, True), ("math_qwen_node", 8, False)],
)
def test_a_preset_fits_80_gib_and_recomputes_activations_only_where_it_must(experiment, gpus, without):
    made = plan(cli.compose([f"+experiment={experiment}"]), Cluster(gpus_per_node=gpus, gpu_gib=80))
    assert made.fits(made.chosen)
    kept = ShardingPlan(
        zero_stage=made.chosen.zero_stage, offload_optimizer=False, gradient_checkpointing=False
    )  # fmt: skip
    assert made.fits(kept) == without
