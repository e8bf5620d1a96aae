"""Two ranks are one rank to rounding, with real processes (torchrun, gloo)."""

import subprocess
import sys

import pytest
from tiny_run import OVERRIDES
from two_ranks import PERSISTENCE, ROOT, assert_same_run, train

LEAVING = """
import atexit, sys
from pathlib import Path
from rltrain import cli, trainer
from rltrain.runtime import dist
from rltrain.errors import RunError

def gloo_threads():
    return [name for task in Path("/proc/self/task").iterdir() if "gloo" in (name := (task / "comm").read_text())]

@atexit.register
def report():
    print("at exit", len(gloo_threads()))

def task(config):
    dist.setup(deadline_s=60)
    run = trainer.build(config)
    print("inside", bool(gloo_threads()))
    if fails:
        raise RunError("with the run in a frame")

fails = sys.argv.pop(1) == "fails"
cli.run(task)
"""


@pytest.mark.parametrize("end", ["returns", "fails"])
def test_no_thread_of_the_process_group_is_left_when_python_ends(end, tmp_path):
    """One that wakes while Python ends takes the process down with SIGABRT, after a run that went well."""
    command = [sys.executable, "-c", LEAVING, end, *OVERRIDES, f"run_dir={tmp_path / 'run'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert (result.returncode, result.stdout.split("\n")[-3:]) == (
        int(end == "fails"),
        ["inside True", "at exit 0", ""],
    ), result.stderr


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks") / "one"
    result = train(folder, 1)
    assert result.returncode == 0, result.stderr
    return folder


def test_two_ranks_make_the_minibatches_of_one(tmp_path):
    for ranks in (1, 2):
        result = train(tmp_path / str(ranks), ranks, "batch.minibatches=2", "steps=2")
        assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "2", tmp_path / "1")


def test_two_ranks_equal_one(one_rank, tmp_path):
    result = train(tmp_path / "two", 2)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "two", one_rank)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_on_two_ranks_equal_one_rank_without(one_rank, tmp_path, stage):
    # By default ZeRO 3 leaves weights as small as these whole on every rank.
    sharded = [f"+deepspeed.extra.zero_optimization.{key}=0" for key in PERSISTENCE] if stage == 3 else []
    result = train(tmp_path / "zero", 2, f"deepspeed.zero_stage={stage}", *sharded)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "zero", one_rank)


def test_ranks_of_unequal_work_under_zero_3(tmp_path):
    """One held-out problem for two ranks: one of them has nothing to decode while the other does."""
    overrides = ["steps=1", "evaluation.problems=1", "evaluation.every_steps=1"]
    sharded = ["deepspeed.zero_stage=3", *(f"+deepspeed.extra.zero_optimization.{key}=0" for key in PERSISTENCE)]
    for ranks, options in ((1, overrides), (2, [*overrides, *sharded])):
        result = train(tmp_path / str(ranks), ranks, *options)
        assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "2", tmp_path / "1")


def test_dynamic_sampling_keeps_the_same_groups_on_two_ranks(tmp_path):
    overrides = ["batch.dynamic_sampling=true", "batch.group_size=2", "steps=2"]
    for ranks in (1, 2):
        result = train(tmp_path / str(ranks), ranks, *overrides)
        assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "2", tmp_path / "1")


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path):
    result = train(tmp_path / "run", 2, "batch.prompts_per_step=5")
    assert result.returncode != 0
    assert "batch.prompts_per_step=5: not divisible by 2 ranks; set a multiple of 2" in result.stderr
