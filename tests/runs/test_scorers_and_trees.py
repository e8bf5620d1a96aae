"""Estimators that score completions, and trees, as whole runs: without rewards, resumed, on two ranks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from tiny_run import OVERRIDES, config, metrics
from two_ranks import assert_same_run
from whole_runs import assert_same_weights, final_weights

from rltrain import sft, trainer
from rltrain.policy.load import load_policy
from rltrain.policy.logprobs import LogprobModel
from rltrain.policy.scorer import Scorer, load_scorer
from rltrain.runs import step_dump
from rltrain.types import SpanRequest

ROOT = Path(__file__).parents[2]
NO_REWARD = ["~rewards.answer", "+reward@eval_rewards.answer=random"]
SHORT = ["steps=3", "debug.bundle_steps=[1]"]
TREE = ["rollout.tree.rounds=2", "rollout.tree.chains=2", "rollout.tree.places=1", "rollout.tree.branches=1"]
TREE += ["batch.group_size=6", *SHORT]
TREES = {
    "tree_rl": [*TREE, "algorithm=tree_rl", "batch.minibatches=2", "batch.packing=shared"],
    "tree_po": [*TREE, "algorithm=tree_po", "rollout.ahead=true", "batch.dynamic_sampling=true"],
}
METHODS = ("opd", "sdpo", "implicit_reward", *TREES)


COLD = ["steps=2", "batch_size=2", "max_length=80"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """What ``scorer.cold_start`` makes."""
    own = ["algorithm=opd", *(f"scorer.cold_start.{setting}" for setting in COLD), "model.init_seed=3"]
    run_config = config(tmp_path_factory.mktemp("teacher") / "run", *own)
    folder = sft.scorer_cold_start(run_config)
    assert folder == f"{run_config.run_dir}/scorer" and sft.scorer_cold_start(run_config) == folder
    return folder


def test_a_run_scores_with_the_phi_that_it_trained(teacher, tmp_path):
    policy, request = load_policy(config(tmp_path).model), SpanRequest(token_ids=(5, 9, 12, 40), spans=((1, 4),))
    module = LogprobModel(policy.model, temperature=1.0)
    found = [
        load_scorer(config(tmp_path, "algorithm=opd", *overrides), policy, module, trained=trained).phi([request])
        for overrides, trained in ((["scorer.cold_start.steps=2"], teacher), ([f"scorer.path={teacher}"], None))
    ]
    expected = LogprobModel(load_policy(config(tmp_path).model, path=teacher).model.eval(), temperature=1.0)
    scored = Scorer(module, expected, token_budget=64).phi([request])
    assert all(torch.equal(phi[0][0], scored[0][0]) for phi in found)
    assert not torch.equal(scored[0][0], Scorer(module, module, token_budget=64).phi([request])[0][0])


@pytest.fixture(scope="module")
def overrides(teacher):
    return {
        "opd": ["algorithm=opd", f"scorer.path={teacher}", *NO_REWARD, *SHORT],
        "sdpo": ["algorithm=sdpo", "scorer.decay=0.5", *SHORT],
        "implicit_reward": ["algorithm=implicit_reward", "scorer.decay=0.5", *SHORT],
        **TREES,
    }


@pytest.fixture(scope="module")
def unbroken(overrides, tmp_path_factory):
    folders = {method: tmp_path_factory.mktemp(method) / "run" for method in METHODS}
    for method, folder in folders.items():
        trainer.fit(config(folder, *overrides[method]))
    return folders


def test_each_learns_and_says_what_it_did(unbroken):
    told = {"opd": "opd/reverse_kl", "sdpo": "sdpo/taught_share", "implicit_reward": "implicit_reward/token_mean"}
    for method, name in told.items():
        lines = metrics(unbroken[method])[1:]
        assert [line["grad_norm"] > 0 for line in lines] == [True] * 3, method
        assert all(math.isfinite(line[name]) for line in lines)
    assert metrics(unbroken["opd"])[1]["opd/dropped_share"] == 0
    first, second = (line["implicit_reward/token_mean"] for line in metrics(unbroken["implicit_reward"])[1:3])
    assert first == 0 != second  # the EMA starts as the initial policy
    assert "kl" not in metrics(unbroken["implicit_reward"])[1]


def test_a_run_without_rewards_keeps_samples_and_bundles(unbroken):
    assert all("reward" not in line for line in metrics(unbroken["opd"]))
    assert "eval_accuracy" in metrics(unbroken["opd"])[0]
    rows = pyarrow.parquet.read_table(unbroken["opd"] / "samples" / "step_000001.parquet").to_pylist()
    assert {row["reward"] for row in rows} == {None}
    (bundle,) = (unbroken["opd"] / "bundles").glob("*")
    assert [group.rewards_G for group in step_dump.read(bundle).records[0].groups] == [None] * 4


def test_leaves_share_tokens_and_teach(unbroken):
    for method in TREES:
        lines = metrics(unbroken[method])[1:]
        assert all(line["tree/leaves_per_token"] > 1 and line["grad_norm"] > 0 for line in lines)
    assert metrics(unbroken["tree_po"])[2]["rollout/staleness"] > 0


def test_the_layout_of_trees_changes_nothing_but_rounding(unbroken, tmp_path):
    trainer.fit(config(tmp_path / "run", *TREES["tree_rl"], "batch.packing=padded"))
    assert_same_run(tmp_path / "run", unbroken["tree_rl"])


def test_a_server_grows_trees(serve, tmp_path):
    """Leaves' log-probs come from two requests each, and are the policy's."""
    over = [*TREES["tree_rl"], "rollout=vllm", "rollout.mode=server", f"rollout.urls=[{serve().url}]", "steps=1"]
    trainer.fit(config(tmp_path / "run", *over))
    line = metrics(tmp_path / "run")[1]
    assert line["tree/leaves_per_token"] > 1 and line["grad_norm"] > 0
    assert line["sampling/sampling_logp_difference/max"] < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bit_for_bit(method, overrides, unbroken, tmp_path):
    folder = tmp_path / "run"
    trainer.fit(config(folder, *overrides[method], "steps=2"))
    trainer.fit(config(folder, *overrides[method]))
    assert metrics(folder)[3:] == metrics(unbroken[method])[3:]
    assert_same_weights(final_weights(folder), final_weights(unbroken[method]))


def test_two_ranks_are_one(overrides, unbroken, tmp_path):
    runs = [[*OVERRIDES, *overrides[method], f"run_dir={tmp_path / method}"] for method in METHODS]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(ROOT / "tests/helpers/fit_all.py"), json.dumps(runs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    for method in METHODS:
        assert_same_run(tmp_path / method, unbroken[method])
