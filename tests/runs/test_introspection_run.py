"""Runs with an introspection head: beside the policy one step ahead, and alone; both resume exactly."""

import math

import pytest
from tiny_run import config, metrics

from rltrain import trainer
from rltrain.errors import ConfigError

HEAD = ["model.introspection.head=true", "model.introspection.lengths=[0,4,8]"]


@pytest.mark.parametrize(
    "options",
    [
        ["advantage=introspection", "rollout.ahead=true", "loss.importance_correction=truncate"],
        ["model.introspection.alone=true", "model.introspection.kl_tokens=8"],
    ],
    ids=["beside", "alone"],
)
def test_a_run_resumes_exactly(tmp_path, options):
    overrides = [*HEAD, *options, "evaluation.every_steps=0"]
    trainer.fit(config(tmp_path / "whole", *overrides))
    trainer.fit(config(tmp_path / "parts", *overrides, "steps=2"))
    trainer.fit(config(tmp_path / "parts", *overrides))
    whole = metrics(tmp_path / "whole")
    assert metrics(tmp_path / "parts") == whole
    assert whole[1]["introspection/cross_entropy"] == pytest.approx(math.log(6))  # rows of zeros: all cells alike


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*HEAD, "rollout=vllm"], "this rollout engine would sample the reserved rows as tokens; set rollout=local"),
        ([*HEAD, "model.lora.rank=4"], "adapters leave the reserved rows frozen; set model.lora.rank=0"),
        (["advantage=introspection"], "the policy has no introspection head; set model.introspection.head=true"),
    ],
    ids=["engine", "adapters", "no head"],
)
def test_what_a_run_refuses(tmp_path, overrides, words):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, *overrides)
