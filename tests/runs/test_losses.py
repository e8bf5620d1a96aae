"""Losses in whole runs: one without ratios, and a run of before losses were parts resumes (ranks: test_ranks.py)."""

import json

import pytest
from tiny_run import config, metrics

from rltrain import trainer
from rltrain.runs import run_folder


def test_a_run_of_before_losses_were_parts_has_todays_kind(tmp_path):
    now = config(tmp_path)
    made = run_folder.resolved(now)
    assert made["loss"]["kind"] == "surrogate"
    older = json.loads(json.dumps(made))
    del older["loss"]["kind"]
    assert run_folder.with_new_keys(older, now) == made
    other = config(tmp_path, "loss=fipo")
    changed = run_folder.changes(run_folder.with_new_keys(older, other), run_folder.resolved(other))
    assert "loss.kind: None -> fipo" in changed


def test_a_loss_without_ratios_is_named_where_they_are_one(tmp_path, caplog):
    trainer.fit(config(tmp_path, "algorithm=fipo", "steps=1", "evaluation.every_steps=0", "batch.minibatches=1"))
    assert "loss=fipo: with one optimiser step per rollout all ratios are 1" in caplog.text
    assert metrics(tmp_path)[-1]["fipo/weight"] == pytest.approx(1.0, abs=1e-5)
