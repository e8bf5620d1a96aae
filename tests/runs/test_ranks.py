"""Two ranks are one rank to rounding, with real processes (torchrun, gloo)."""

import subprocess
import sys

import pytest
from tiny_run import OVERRIDES, config, metrics
from two_ranks import PERSISTENCE, ROOT, assert_same_run, train, train_all

from rltrain import trainer

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


# What both sides of a comparison have, and what two ranks have on top.
SHARDED = ["deepspeed.zero_stage=3", *(f"+deepspeed.extra.zero_optimization.{key}=0" for key in PERSISTENCE)]
PENALISED = ["loss.share=0.05", "steps=3", "evaluation.every_steps=0", "batch.minibatches=2"]
LORA = ["model.lora.rank=4", "model.lora.target_modules=[q_proj,lm_head]", "steps=2", "evaluation.every_steps=0"]
CASES = {
    "plain": ([], []),
    "ZeRO 1": ([], ["deepspeed.zero_stage=1"]),
    "ZeRO 2": ([], ["deepspeed.zero_stage=2"]),
    "ZeRO 3": ([], SHARDED),  # by default it leaves weights as small as these whole on every rank
    "minibatches": (["batch.minibatches=2", "steps=2"], []),
    # One held-out problem for two ranks: one of them has nothing to decode while the other does.
    "unequal work": (["steps=1", "evaluation.problems=1", "evaluation.every_steps=1"], SHARDED),
    "dynamic sampling": (["batch.dynamic_sampling=true", "batch.group_size=2", "steps=2"], []),
    "kl_cov": (["algorithm=kl_cov", *PENALISED], []),
    "clip_cov": (["algorithm=clip_cov", "loss.cov_low=0.0", *PENALISED], []),
    # The check before the first step perturbs adapters, and puts them back on every rank.
    "adapters": (LORA, SHARDED),
}


def test_two_ranks_are_one_rank_in_every_case(tmp_path):
    train_all(tmp_path, {name: [*both, *two] for name, (both, two) in CASES.items()})
    alone = {}
    for name, (both, _) in CASES.items():
        key = " ".join(both)
        if key not in alone:
            alone[key] = tmp_path / f"{name} alone"
            trainer.fit(config(alone[key], *both))
        assert_same_run(tmp_path / name, alone[key])
    for name in ("kl_cov", "clip_cov"):
        selected = [line["loss/selected"] for line in metrics(tmp_path / name) if "loss/selected" in line]
        assert selected and all(0 < share < 0.1 for share in selected), name


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path):
    result = train(tmp_path / "run", 2, "batch.prompts_per_step=5")
    assert result.returncode != 0
    assert "batch.prompts_per_step=5: not divisible by 2 ranks; set a multiple of 2" in result.stderr
