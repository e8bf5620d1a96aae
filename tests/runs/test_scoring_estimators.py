"""Estimators that score completions, as whole runs: without rewards, resumed, on two ranks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from tiny_run import OVERRIDES, config, metrics
from two_ranks import assert_same_run
from whole_runs import assert_same_weights, final_weights

from rltrain import trainer
from rltrain.policy.load import load_policy, save_policy
from rltrain.runs import step_dump

ROOT = Path(__file__).parents[2]
NO_REWARD = ["~rewards.answer", "+reward@eval_rewards.answer=random"]
SHORT = ["steps=3", "debug.bundle_steps=[1]"]
METHODS = ("opd", "sdpo", "implicit_reward")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """Of each method; the teacher is the same architecture with other weights."""
    teacher = tmp_path_factory.mktemp("teacher")
    save_policy(load_policy(config(teacher, "model.init_seed=3").model), teacher)
    return {
        "opd": ["algorithm=opd", f"scorer.path={teacher}", *NO_REWARD, *SHORT],
        "sdpo": ["algorithm=sdpo", "scorer.decay=0.5", *SHORT],
        "implicit_reward": ["algorithm=implicit_reward", "scorer.decay=0.5", *SHORT],
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
