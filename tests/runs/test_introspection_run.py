"""Runs with an introspection head: beside the policy one step ahead, and alone; both resume exactly."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
from tiny_run import config, metrics

from rltrain import trainer
from rltrain.errors import ConfigError
from rltrain.report.page import build

HEAD = ["model.introspection.head=true", "model.introspection.lengths=[0,4,8]"]
SCRIPT = Path(__file__).parents[2] / "scripts" / "replay.py"
SPEC = importlib.util.spec_from_file_location("replay", SCRIPT)
replay = sys.modules["replay"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(replay)
GAINS = ("accuracy", "majority", "weighted_vote", "gain_over_majority", "gain_over_weighted_vote")


def resumed(tmp_path, *options):
    """The metrics of a run, which are those of one in two parts. Its third step replays bit for bit."""
    trainer.fit(config(tmp_path / "whole", *HEAD, *options, "debug.bundle_steps=[3]"))
    assert replay.replay(tmp_path / "whole/bundles/step_000003.safetensors", None) == 0
    trainer.fit(config(tmp_path / "parts", *HEAD, *options, "steps=2"))
    trainer.fit(config(tmp_path / "parts", *HEAD, *options))
    whole = metrics(tmp_path / "whole")
    assert metrics(tmp_path / "parts") == whole
    assert whole[1]["introspection/cross_entropy"] == pytest.approx(math.log(6))  # rows of zeros: all cells alike
    return whole


def test_beside_the_policy_one_step_ahead(tmp_path):
    """Held-out predictions begin at 0.5 for every token; the report shows them, and what an evaluation measured."""
    ahead = ["rollout.ahead=true", "loss.importance_correction=truncate"]
    first = resumed(tmp_path, "advantage=introspection", *ahead)[0]
    share = first["eval_reward"]  # each of the random rewards is of a completion of ten tokens
    assert first["eval_introspection/ece"] == pytest.approx(abs(share - 0.5))
    row = {"budget": 9.0, "tokens": 8.0, "problems": 6.0} | dict.fromkeys(GAINS, 0.25)
    row |= {f"{name}_se": 0.0 for name in GAINS}
    (tmp_path / "whole/evaluation.json").write_text(json.dumps({"adaptive": [row]}))
    page = build([tmp_path / "whole"])
    assert "the expected calibration error is" in page
    assert "over the vote weighted by prediction, points" in page


def test_alone_with_the_policy_held(tmp_path):
    resumed(tmp_path, "model.introspection.alone=true", "model.introspection.kl_tokens=8", "evaluation.every_steps=0")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*HEAD, "rollout=vllm"], "this rollout engine would sample the reserved rows as tokens; set rollout=local"),
        ([*HEAD, "model.lora.rank=4"], "adapters leave the reserved rows frozen; set model.lora.rank=0"),
        (
            [*HEAD, "algorithm=opd", "~rewards.answer", "evaluation.every_steps=0"],
            "learns from rewards, and the run has",
        ),
        (["advantage=introspection"], "the policy has no introspection head; set model.introspection.head=true"),
    ],
    ids=["engine", "adapters", "no rewards", "no head"],
)
def test_what_a_run_refuses(tmp_path, overrides, words):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, *overrides)
