"""ZeRO 3 samples by the same decoder as ZeRO 0: the weights are whole while it does."""

import pytest
from tiny_run import config

from rltrain import trainer
from rltrain.rollout.llama_step import LlamaStep
from rltrain.runtime import dist

PERSISTENCE = ("stage3_param_persistence_threshold", "stage3_model_persistence_threshold")
SHARDED = [f"+deepspeed.extra.zero_optimization.{key}=0" for key in PERSISTENCE]


@pytest.mark.parametrize(("stage", "rank"), [(0, 0), (3, 0), (3, 4)])
def test_the_fast_path_is_taken_with_whole_weights(tmp_path, monkeypatch, stage, rank):
    dist.setup(deadline_s=60)
    steps, call = [], LlamaStep.__call__
    monkeypatch.setattr(LlamaStep, "__call__", lambda self, *args: (steps.append(1), call(self, *args))[1])
    overrides = [f"deepspeed.zero_stage={stage}", f"model.lora.rank={rank}", *(SHARDED if stage == 3 else [])]
    run = trainer.build(config(tmp_path, *overrides))
    assert run.rollout.decoder_name == "the decoder for Llama-shaped models"
    prompts, _ = run.source.next(0)
    steps.clear()
    with run.scope(0).weights():
        groups = run.rollout.generate(prompts, step=0, group_size=4)
    longest = max(len(ids) for group in groups for ids in group.completion_ids)
    assert longest - 1 <= len(steps) <= longest + 3
    assert LlamaStep.supports(run.policy.model) == (stage == 0)  # outside, the weights are sharded again
