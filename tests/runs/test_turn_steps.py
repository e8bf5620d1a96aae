"""A step over completions of several turns: old and reference log-probs, updates, the step dump and its replay."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import config, metrics

from rltrain import trainer, update
from rltrain.advantages.estimator import estimator_of
from rltrain.runs import step_dump
from rltrain.runtime import dist
from rltrain.types import Completion, Group, Turn, among_observed

SCRIPT = Path(__file__).parents[2] / "scripts" / "replay.py"
SPEC = importlib.util.spec_from_file_location("replay_turns", SCRIPT)
replay = sys.modules["replay_turns"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(replay)

TURNS = (Turn(written=3, observed=4, state_key="a", called=True, text="ab", reply="cd"), Turn(written=2, text="e"))


def talk(finish):
    logprobs = among_observed((-1.0, -1.5, -2.0, -1.25, -0.5), TURNS, math.nan)
    return Completion(token_ids=(5, 6, 7, 8, 9, 8, 9, 7, 4), logprobs=logprobs, finish=finish, text="e", turns=TURNS)


PLAIN = Completion(token_ids=(5, 9, 4), logprobs=(-1.0, -0.5, -2.0), finish="stop", text="f")
# The filter takes one written id out, and an observed id, which is out already.
FILTERS = [torch.tensor([True] * 2 + [False] * 2 + [True] * 5), torch.ones(9).bool(), torch.ones(3).bool()]


def test_a_step_with_turns_counts_written_tokens_and_replays_bit_for_bit(tmp_path, capsys):
    """By group: 5 written less 1 filtered, 5 that were cut at the limit, 3: 7 tokens in 3 rows."""
    dist.setup(deadline_s=60)
    overrides = ["batch.update_epochs=2", "sampling.top_k=5", "loss.kl_coef=0.1", "loss.mask_truncated=true"]
    run = trainer.build(config(tmp_path, *overrides, "debug.bundle_steps=[1]", "debug.bundle_weights=true"))
    prompts, _ = run.source.next(0)
    rewards_G = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    groups = [
        Group(prompt=one, completions=(talk("stop"), talk("length"), PLAIN), rewards_G=rewards_G) for one in prompts
    ]
    scope = run.scope(0)
    advantages = estimator_of(run.config.advantage)(groups, run.context(0, scope.metrics))
    assert not any(rows[0][3:7].any() for rows in advantages.values)
    masked = replace(advantages, masks=[FILTERS] * 4)
    (minibatch,) = update.make_minibatches(run, scope, groups, masked)
    update.update_policy(run, scope, [minibatch])
    values = scope.metrics.reduce()
    assert (minibatch.denominators.rows, minibatch.denominators.tokens) == (12, 28)
    assert values["policy_tokens"] == 2 * 28
    assert values["loss/truncated_ratio"] == pytest.approx(1 / 3)
    measured = ("loss", "kl", "grad_norm", "entropy/trained", "sampling/sampling_logp_difference/max")
    assert all(math.isfinite(values[name]) for name in measured)
    path = tmp_path / "bundles" / "step_000001.safetensors"
    (record,) = step_dump.read(path).records
    assert [group.completions for group in record.groups] == [group.completions for group in groups]
    assert [mask_T.tolist() for mask_T in record.masks[0]] == [
        [True, True] + [False] * 5 + [True] * 2, [False] * 9, [True] * 3,
    ]  # fmt: skip
    assert replay.replay(path, None) == 0
    assert "equal bit for bit" in capsys.readouterr().out


def test_a_run_that_masks_truncated_completions(tmp_path):
    """What is trained on are the tokens of the completions that ended by themselves; all rows count."""
    options = ["loss.mask_truncated=true", "sampling.max_new_tokens=60", "steps=1", "evaluation.every_steps=0"]
    trainer.fit(config(tmp_path, *options, "loss.kl_coef=0.1", "tracking.samples_every_steps=1"))
    line = metrics(tmp_path)[-1]
    assert 0 < line["loss/truncated_ratio"] == line["completions/clipped_ratio"] < 1
    ended = line["completions/tokens"] - 60 * 16 * line["completions/clipped_ratio"]
    assert line["policy_tokens"] == line["loss_denominator/tokens"] == ended
    assert line["loss_denominator/rows"] == 16
    assert line["grad_norm"] > 0
