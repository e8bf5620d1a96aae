"""Step dumps: replayed bit for bit, and what was changed in one is named."""

import hashlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_run import config
from two_ranks import train

from rltrain import trainer, update
from rltrain.advantages.check import EstimatorError
from rltrain.engine.deepspeed import NonFiniteError
from rltrain.errors import ConfigError
from rltrain.runs import checkpoint, step_dump
from rltrain.types import Advantages, Completion, Group

SCRIPT = Path(__file__).parents[2] / "scripts" / "replay.py"
SPEC = importlib.util.spec_from_file_location("replay", SCRIPT)
replay = sys.modules["replay"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(replay)


def path_of(run_dir, step) -> Path:
    return run_dir / "bundles" / f"step_{step:06d}.safetensors"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "run"
    options = ["steps=2", "debug.bundle_steps=[1,2]", "checkpoint.every_steps=1", "evaluation.every_steps=0"]
    trainer.fit(config(folder, *options, "loss.kl_coef=0.01"))
    return folder


@pytest.mark.parametrize("step", [1, 2])
def test_a_step_replays_bit_for_bit(run_dir, step, capsys):
    assert replay.replay(path_of(run_dir, step), None) == 0
    assert "equal bit for bit" in capsys.readouterr().out


def test_a_step_dump_holds_what_the_step_used(run_dir):
    made = step_dump.read(path_of(run_dir, 2))
    (record,) = made.records
    assert [len(group.completions) for group in record.groups] == [4] * 4
    counted = sum(len(one.token_ids) for group in record.groups for one in group.completions)
    assert sum(int((batch.weights_N > 0).sum()) for batch in record.batches) == counted
    assert all(batch.reference_logprobs_N is not None for batch in record.batches)
    assert made.facts["config"]["seed"] == 0
    assert record.grad_norm > 0
    assert made.weights == {}


def test_an_estimator_with_declared_needs_is_not_recomputed(run_dir):
    made = step_dump.read(path_of(run_dir, 1))
    advantage = {"kind": "custom", "import_path": "user_estimators:at_high_entropy"}
    facts = {**made.facts, "config": {**made.facts["config"], "advantage": advantage}}
    check = replay.check_advantages(replace(made, facts=facts), 0.0)
    assert check.difference is None
    assert check.where == "not recomputed: needs more than these groups"


def tampered(source, target, change) -> Path:
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, target, metadata=metadata)
    return target


@pytest.mark.parametrize(("name", "first"), [
    ("rank0/advantages", "advantages (group 0 sample 0[0]: stored "),
    ("rank0/batch0/advantages_N", "advantages in the micro-batches (rank 0 micro-batch 0 sequence "),
    ("rank0/logprobs0", "log-probs (rank 0 micro-batch 0[0]: stored "),
    ("rank0/losses", "losses (rank 0 micro-batch 0[0]: stored "),
])  # fmt: skip
def test_what_was_changed_is_named(run_dir, tmp_path, capsys, name, first):
    path = tampered(path_of(run_dir, 1), tmp_path / "changed", lambda tensors: tensors[name][0].add_(1e-3))
    assert replay.replay(path, None) == 1
    assert f"first difference: {first}" in capsys.readouterr().out


def test_other_weights_are_named_before_anything_is_forwarded(run_dir, capsys):
    other = checkpoint.list_checkpoints(run_dir)[-1].policy
    assert replay.replay(path_of(run_dir, 2), str(other)) == 1
    printed = capsys.readouterr().out
    assert f"first difference: weights ({other}: sha256 " in printed
    assert "log-probs" not in printed


def test_the_hash_covers_names_types_shapes_and_bytes():
    value = torch.tensor([[1.0, 2.0]])
    expected = hashlib.sha256(b"w torch.float32 (1, 2)\n" + value.numpy().tobytes()).hexdigest()
    assert step_dump.weights_of([("w", value)], keep=False).sha256 == expected
    kept = step_dump.weights_of([("w", value)], keep=True).tensors["w"]
    value.zero_()
    assert kept.tolist() == [[1.0, 2.0]]


def test_weights_that_are_not_finite_stop_before_the_optimiser_and_replay_as_such(tmp_path, capsys):
    run = trainer.build(config(tmp_path / "run", "debug.bundle_weights=true"))
    with torch.no_grad():
        run.policy.model.get_output_embeddings().weight[0, 0] = float("nan")
    before = {name: value.clone() for name, value in run.policy.model.named_parameters()}
    completion = Completion(token_ids=(10, 11, 12), logprobs=(-1.0, -1.0, -1.0), finish="stop")
    prompts, _ = run.source.next(0)
    rewards_G = torch.tensor([0.0, 1.0])
    groups = [Group(prompt=one, completions=(completion, completion), rewards_G=rewards_G) for one in prompts]
    advantages = [[torch.ones(3) for _ in group.completions] for group in groups]
    batches, _ = update.micro_batches(run, groups, advantages)
    record = step_dump.StepRecord(1, 0, groups, advantages, batches)
    with pytest.raises(NonFiniteError, match=r"step 1: the loss of 1 micro-batches is not finite, .* micro-batch 1 of"):
        update.update(run, run.scope(0), record)
    for name, value in run.policy.model.named_parameters():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num())
    assert replay.replay(path_of(tmp_path / "run", 1), None) == 1
    printed = capsys.readouterr().out
    assert "not finite: log-probs: 24 values, the first in rank 0 micro-batch 0" in printed
    assert "equal   losses" in printed  # NaN again


def careless(groups, options, context):
    """An estimator that forgets that a reward may abstain."""
    means = [group.rewards_G - group.rewards_G.mean() for group in groups]
    return Advantages(
        values=[
            [value.expand(len(ids)).clone() for value, ids in zip(mean, group.completion_ids, strict=True)]
            for mean, group in zip(means, groups, strict=True)
        ]
    )


def sometimes_nan(groups, options, context):
    return [[float("nan"), *(float(i) for i in range(len(group.completions) - 1))] for group in groups]


def test_a_nan_reward_that_an_estimator_spreads_stops_the_run_before_the_optimiser(tmp_path):
    parts = ["reward@rewards.answer=custom", f"rewards.answer.import_path={__name__}:sometimes_nan"]
    parts += ["advantage=custom", f"advantage.import_path={__name__}:careless", "evaluation.every_steps=0"]
    with pytest.raises(
        EstimatorError, match=r"completion 1: the value of token 0 is nan.*a reward of this group is NaN"
    ):
        trainer.fit(config(tmp_path / "run", *parts))


def test_two_ranks_write_one_dump_that_one_process_replays_to_rounding(tmp_path, capsys):
    options = ["steps=1", "debug.bundle_steps=[1]", "evaluation.every_steps=0", "checkpoint.every_steps=0"]
    result = train(tmp_path / "run", 2, *options)
    assert result.returncode == 0, result.stderr
    assert len(step_dump.read(path_of(tmp_path / "run", 1)).records) == 2
    assert replay.replay(path_of(tmp_path / "run", 1), None) == 0
    assert "equal within a relative rounding of 0.0001" in capsys.readouterr().out


def test_a_file_that_is_no_step_dump_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ConfigError, match="not a step dump of version 1"):
        step_dump.read(tmp_path / "other")


def test_steps_of_dumps_count_from_one(tmp_path):
    with pytest.raises(ConfigError, match="steps count from 1, as in metrics.jsonl"):
        config(tmp_path, "debug.bundle_steps=[0]")
