"""Whole runs over turns under estimators that credit turns, or ask for continuations inside them."""

import itertools
import math

import pyarrow.parquet as pq
import pytest
from tiny_run import config, metrics

from rltrain import trainer
from rltrain.advantages.estimator import estimator_of
from rltrain.report.estimators import SampledStep
from rltrain.report.folder import read_run
from rltrain.report.samples import as_group
from rltrain.types import Context

TALKING = [
    "environment=custom",
    "environment.import_path=talking_letters:Letters",
    "environment.reply_tokens=4",
    "environment.workers=1",
    "sampling.max_new_tokens=24",
    "steps=1",
    "evaluation.every_steps=0",
    "checkpoint.every_steps=9",
    "tracking.samples_every_steps=1",
]


def sampled(run_dir, *overrides):
    """The rows of the only step, by group, and its metrics."""
    trainer.fit(config(run_dir, *TALKING, *overrides))
    rows = pq.read_table(run_dir / "samples" / "step_000001.parquet").to_pylist()
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row["problem_id"])]
    return groups, metrics(run_dir)[-1]


def is_written(row, t):
    logprob = row["logprobs"][t]
    return logprob is not None and not math.isnan(logprob)


@pytest.mark.parametrize(("name", "other"), [("gigpo", "mt_grpo"), ("mt_grpo", "gigpo")])
def test_the_samples_of_a_run_give_its_advantages_again_and_those_of_others(tmp_path, name, other):
    groups, line = sampled(tmp_path, f"algorithm={name}")
    records = [as_group(rows) for rows in groups]
    shown = SampledStep(read_run(tmp_path, label="run"), 1, groups).under(other)
    assert shown.remark == f"settings of algorithm={other}; recomputed from token ids and rewards"
    expected = estimator_of(other)(records, Context()).values
    assert shown.values == [[value_T.tolist() for value_T in rows] for rows in expected]
    found = estimator_of(name)(records, Context()).values
    observed = 0
    for rows, values in zip(groups, found, strict=True):
        for row, value_T in zip(rows, values, strict=True):
            assert row["advantages"] == pytest.approx(value_T.tolist(), abs=1e-6)
            unwritten = [t for t in range(len(row["token_ids"])) if not is_written(row, t)]
            assert not any(row["advantages"][t] for t in unwritten)
            observed += len(unwritten)
    assert observed > 40 and line["grad_norm"] > 0


def test_steps_of_turns_are_valued_by_continuations_through_the_environment(tmp_path):
    """One advantage a step: the reward less the mean of the others, in all. Every step begins with a written token."""
    overrides = ["algorithm=vineppo", "advantage.delimiter=a", "advantage.draws=2", "advantage.whiten=false"]
    groups, line = sampled(tmp_path, *overrides)
    longest = 0
    for row in itertools.chain(*groups):
        starts = list(itertools.accumulate([0, *row["note/segment_tokens"][:-1]]))
        assert all(is_written(row, int(t)) for t in starts)
        credit = sum(row["advantages"][int(t)] for t in starts)
        assert credit == pytest.approx(row["reward"] - row["note/segment_value"][0], abs=1e-6)
        longest = max(longest, len(starts))
    assert longest > 2 and line["continuations/requests"] > 8
