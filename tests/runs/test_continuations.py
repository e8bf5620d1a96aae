"""Continuations, grades and states in whole runs: engines, ranks, resume, what is logged."""

import json

import pytest
import torch
from tiny_run import config, metrics
from two_ranks import ROOT, assert_same_run, train
from vllm_stand_in import StandIn
from whole_runs import assert_same_weights, final_weights

from rltrain import trainer
from rltrain.policy.load import load_policy
from rltrain.runs import checkpoint

HALVES = ["advantage=custom", "advantage.import_path=user_continuations:halves", "+advantage.options={draws: 3}"]


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


def test_two_ranks_are_one(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests/helpers"))
    result = train(tmp_path / "run", 2, *HALVES)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "run", whole)


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


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["vineppo", "spo"])
def test_two_ranks_are_one_for_the_estimators_that_continue(algorithm, tmp_path):
    for ranks in (1, 2):
        result = train(tmp_path / str(ranks), ranks, f"algorithm={algorithm}", "advantage.draws=3", "steps=2")
        assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "2", tmp_path / "1")
