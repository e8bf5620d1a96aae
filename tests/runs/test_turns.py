"""Whole runs over turns: what is sampled is what is trained on, killed in a turn, sampled ahead, on two ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from tiny_run import OVERRIDES, config, metrics
from two_ranks import ROOT, assert_same_run
from whole_runs import assert_same_weights, final_weights

from rltrain import trainer
from rltrain.policy.load import load_policy
from rltrain.runs import checkpoint

TALKING = [
    "environment=custom",
    "environment.import_path=talking_letters:Letters",
    "environment.reply_tokens=4",
    "environment.workers=1",
    "sampling.max_new_tokens=24",
    "steps=2",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=9",
    "tracking.samples_every_steps=1",
    "evaluation.problems=2",
]
AHEAD = [*TALKING, "rollout.ahead=true", "evaluation.every_steps=0"]


def alone():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) / "run" for name in ("now", "ahead")}
    for folder, overrides in zip(folders.values(), (TALKING, AHEAD), strict=True):
        trainer.fit(config(folder, *overrides))
    return folders


def samples(run_dir, step):
    return pq.read_table(run_dir / "samples" / f"step_{step:06d}.parquet").to_pylist()


def test_what_was_sampled_is_what_is_trained_on(runs):
    """The ids of a sample give its sampled log-probs by a plain forward of the checkpoint before its step."""
    saved = {one.step: str(one.policy) for one in checkpoint.list_checkpoints(runs["now"])}
    policy, observed = load_policy(config(runs["now"]).model, path=saved[1]), 0
    for row in samples(runs["now"], 2):
        ids = torch.tensor([row["prompt_ids"] + row["token_ids"]])
        with torch.no_grad():
            logprobs = policy.model(input_ids=ids).logits[0].log_softmax(-1)
        start = len(row["prompt_ids"])
        for place, (token, logprob) in enumerate(zip(row["token_ids"], row["logprobs"], strict=True)):
            if logprob is None or logprob != logprob:
                observed += 1
            else:
                assert logprob == pytest.approx(float(logprobs[start - 1 + place, token]), abs=1e-5)
    assert observed > 16
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-5 for line in metrics(runs["now"])[1:])


@pytest.mark.parametrize("name", ["now", "ahead"])
def test_a_run_that_is_killed_in_a_turn_goes_on_bit_for_bit(runs, tmp_path, name):
    """SIGKILL in the third rollout, after an evaluation and step 1, or steps 1 and 2 while step 2 is trained on."""
    script = str(ROOT / "tests/helpers/killed_in_turns.py")
    overrides = {"now": TALKING, "ahead": AHEAD}[name]
    command = [sys.executable, script, "3", *OVERRIDES, *overrides, f"run_dir={tmp_path / 'run'}"]
    result = subprocess.run(command, cwd=ROOT, env=alone(), capture_output=True, text=True, timeout=400)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert len(metrics(tmp_path / "run")) < len(metrics(runs[name]))
    trainer.fit(config(tmp_path / "run", *overrides))
    assert metrics(tmp_path / "run") == metrics(runs[name])
    assert_same_weights(final_weights(tmp_path / "run"), final_weights(runs[name]))


def test_turns_sampled_ahead_are_kept_with_the_checkpoint(runs, tmp_path):
    shutil.copytree(runs["ahead"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000002")
    trainer.fit(config(tmp_path / "run", *AHEAD))
    assert metrics(tmp_path / "run") == metrics(runs["ahead"])
    assert_same_weights(final_weights(tmp_path / "run"), final_weights(runs["ahead"]))


def test_two_ranks_are_one(runs, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    listed = json.dumps([[*OVERRIDES, *TALKING, f"run_dir={tmp_path / 'run'}"]])
    command = [*launcher, str(ROOT / "tests/helpers/fit_all.py"), listed]
    result = subprocess.run(command, cwd=ROOT, env=alone(), capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "run", runs["now"])
