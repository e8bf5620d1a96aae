"""Trees in whole runs: resumed, on two ranks, with minibatches, dynamic sampling, ahead, and in every layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import OVERRIDES, config, metrics
from two_ranks import assert_same_run
from whole_runs import assert_same_weights, final_weights

from rltrain import trainer

ROOT = Path(__file__).parents[2]
TREE = ["rollout.tree.rounds=2", "rollout.tree.chains=2", "rollout.tree.places=1", "rollout.tree.branches=1"]
TREE += ["batch.group_size=6", "steps=3"]
RUNS = {
    "minibatches": [*TREE, "algorithm=tree_rl", "batch.minibatches=2", "batch.packing=shared"],
    "ahead": [*TREE, "algorithm=tree_po", "rollout.ahead=true", "batch.dynamic_sampling=true"],
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) / "run" for name in RUNS}
    for name, folder in folders.items():
        trainer.fit(config(folder, *RUNS[name]))
    return folders


def test_leaves_share_tokens_and_teach(unbroken):
    for folder in unbroken.values():
        lines = metrics(folder)[1:]
        assert all(line["tree/leaves_per_token"] > 1 and line["grad_norm"] > 0 for line in lines)
    assert metrics(unbroken["ahead"])[2]["rollout/staleness"] > 0


@pytest.mark.parametrize("name", RUNS)
def test_resume_is_bit_for_bit(name, unbroken, tmp_path):
    folder = tmp_path / "run"
    trainer.fit(config(folder, *RUNS[name], "steps=2"))
    trainer.fit(config(folder, *RUNS[name]))
    assert metrics(folder)[3:] == metrics(unbroken[name])[3:]
    assert_same_weights(final_weights(folder), final_weights(unbroken[name]))


def test_the_layout_changes_nothing_but_rounding(unbroken, tmp_path):
    trainer.fit(config(tmp_path / "run", *RUNS["minibatches"], "batch.packing=padded"))
    assert_same_run(tmp_path / "run", unbroken["minibatches"])


def test_two_ranks_are_one(unbroken, tmp_path):
    runs = [[*OVERRIDES, *overrides, f"run_dir={tmp_path / name}"] for name, overrides in RUNS.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(ROOT / "tests/helpers/fit_all.py"), json.dumps(runs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    for name in RUNS:
        assert_same_run(tmp_path / name, unbroken[name])


def test_a_server_grows_trees(serve, tmp_path):
    """Leaves' log-probs come from two requests each, and are the policy's."""
    over = [*RUNS["minibatches"], "rollout=vllm", "rollout.mode=server", f"rollout.urls=[{serve().url}]", "steps=1"]
    trainer.fit(config(tmp_path / "run", *over))
    line = metrics(tmp_path / "run")[1]
    assert line["tree/leaves_per_token"] > 1 and line["grad_norm"] > 0
    assert line["sampling/sampling_logp_difference/max"] < 1e-3
