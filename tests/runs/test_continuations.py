"""Continuations, grades and states in whole runs: engines, ranks, resume, what is logged."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from tiny_run import OVERRIDES, config, metrics
from two_ranks import PERSISTENCE, ROOT, assert_same_run
from vllm_stand_in import StandIn
from whole_runs import assert_same_weights, final_weights

from rltrain import trainer
from rltrain.policy.load import load_policy
from rltrain.runs import checkpoint

HALVES = ["advantage=custom", "advantage.import_path=user_continuations:halves", "+advantage.options={draws: 3}"]

SHORT = ["steps=2", "checkpoint.every_steps=1", "evaluation.every_steps=0", "rollout.prefix_tokens_per_pass=64"]
RUNS = {
    "vineppo": ["algorithm=vineppo", "advantage.draws=2", "advantage.start=continuations", *SHORT],
    "spo": ["algorithm=spo", "advantage.draws=2", "advantage.interval=2", *SHORT],
    "idle": [*HALVES, "+advantage.options.bit=3", "batch.prompts_per_step=2", *SHORT, "steps=3"],
}


def alone():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}"}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) / "run" for name in RUNS}
    for name, folder in folders.items():
        trainer.fit(config(folder, *RUNS[name]))
    return folders


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continuations") / "run"
    trainer.fit(config(folder, *HALVES))
    return folder


def test_a_run_logs_what_continuations_cost(whole):
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()][1:]
    for line in lines:
        assert line["continuations/requests"] == 4 * 4
        assert line["asked"] == 4 * 4 * 3
        assert 16 * 3 <= line["continuations/tokens"] <= 16 * 3 * 10
        share = line["timing_s/continuations"] / line["timing_s/step"]
        assert line["continuations/share"] == pytest.approx(share) and 0 < share < 1
        assert line["timing_s/continuations"] < line["timing_s/advantage"]


def test_grading_leaves_the_rewards_of_the_step_alone(whole, tmp_path):
    """The first step has the rewards of a run that asks for nothing."""
    trainer.fit(config(tmp_path / "run", "steps=1", "evaluation.every_steps=0", "checkpoint.every_steps=0"))
    plain, asking = metrics(tmp_path / "run")[-1], metrics(whole)[1]
    names = [name for name in plain if "reward" in name or "completions" in name or name.startswith("groups")]
    assert len(names) > 8
    assert {name: asking[name] for name in names} == {name: plain[name] for name in names}


def test_a_run_that_is_lost_between_continuations_goes_on_bit_for_bit(whole, tmp_path, monkeypatch):
    """Step 4 is lost behind its continuations; the checkpoint of step 2 repeats step 3, state included."""
    monkeypatch.setenv("LOST_IN_STEP", "4")
    with pytest.raises(SystemExit, match="in the middle of a step"):
        trainer.fit(config(tmp_path / "run", *HALVES))
    monkeypatch.delenv("LOST_IN_STEP")
    trainer.fit(config(tmp_path / "run", *HALVES))
    assert metrics(tmp_path / "run") == metrics(whole)
    assert_same_weights(final_weights(tmp_path / "run"), final_weights(whole))
    saved = [checkpoint.load_tensors(checkpoint.list_checkpoints(run)[-1]) for run in (whole, tmp_path / "run")]
    assert saved[0].keys() == saved[1].keys() == {"state/advantage/custom:total"}
    total = saved[0]["state/advantage/custom:total"]
    assert total.dtype == torch.float64 and torch.equal(total, saved[1]["state/advantage/custom:total"])
    assert float(total) == pytest.approx(sum(16 * line["reward"] for line in metrics(whole)[1:]))


def test_a_run_that_is_killed_inside_continuations_goes_on_bit_for_bit(unbroken, tmp_path):
    """SIGKILL between two passes of forwarded prefixes, in step 2 of 2 with a checkpoint behind step 1."""
    script = str(ROOT / "tests/helpers/killed_in_continuations.py")
    command = [sys.executable, script, "2", *OVERRIDES, *RUNS["vineppo"], f"run_dir={tmp_path / 'run'}"]
    result = subprocess.run(command, cwd=ROOT, env=alone(), capture_output=True, text=True, timeout=400)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1]
    trainer.fit(config(tmp_path / "run", *RUNS["vineppo"]))
    assert metrics(tmp_path / "run") == metrics(unbroken["vineppo"])
    assert_same_weights(final_weights(tmp_path / "run"), final_weights(unbroken["vineppo"]))


def test_two_ranks_are_one(whole, unbroken, tmp_path):
    """Also where a rank asks for nothing, and where ZeRO 3 shards the weights that continue."""
    sharded = ["deepspeed.zero_stage=3", *(f"+deepspeed.extra.zero_optimization.{key}=0" for key in PERSISTENCE)]
    runs = {"halves": HALVES, **RUNS, "sharded": [*RUNS["vineppo"], *sharded]}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    listed = json.dumps([[*OVERRIDES, *own, f"run_dir={tmp_path / name}"] for name, own in runs.items()])
    command = [*launcher, str(ROOT / "tests/helpers/fit_all.py"), listed]
    result = subprocess.run(command, cwd=ROOT, env=alone(), capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    for name in runs:
        expected = {"halves": whole, "sharded": unbroken["vineppo"]}.get(name) or unbroken[name]
        assert_same_run(tmp_path / name, expected)


def test_what_the_ranks_compare_has_requests_and_ranks_without(unbroken):
    """Two groups of four completions, each on a rank of its own: one group asks, then neither, then both."""
    asked = {name: [line["continuations/requests"] for line in metrics(unbroken[name])[1:]] for name in RUNS}
    assert asked["idle"] == [4, 0, 8]
    assert min(asked["vineppo"]) >= 4 and min(asked["spo"]) > 16


def test_ahead_continues_with_the_weights_that_are_trained(whole, tmp_path):
    """Its first step samples and continues with the first weights, as a run that does not sample ahead."""
    trainer.fit(config(tmp_path / "run", *HALVES, "steps=2", "rollout.ahead=true"))
    first, expected = metrics(tmp_path / "run")[1], metrics(whole)[1]
    for name in ("reward", "asked", "total", "continuations/requests", "continuations/tokens"):
        assert first[name] == expected[name]


@pytest.mark.parametrize("ahead", [False, True])
def test_servers_continue_as_the_local_engine(whole, tmp_path, ahead):
    server = StandIn(load_policy(config(tmp_path / "unused").model).model)
    try:
        over = ["rollout=vllm", "rollout.mode=server", f"rollout.urls=[{server.url}]", f"rollout.ahead={ahead}"]
        trainer.fit(config(tmp_path / "run", *HALVES, "steps=1", "evaluation.every_steps=0", *over))
    finally:
        server.stop()
    first, expected = metrics(tmp_path / "run")[-1], metrics(whole)[1]
    assert first["reward"] == expected["reward"]
    assert first["continuations/requests"] == 16 and first["asked"] == 48
