"""Turns in what a run writes about itself: metrics by hand, columns of samples and back, rows for trackers."""

import pyarrow.parquet as pq
import pytest
from turn_groups import Letters, advantages, answered, called, failed, group

from rltrain.evaluate import group_metrics
from rltrain.report.samples import as_group
from rltrain.runs.metrics import Accumulator
from rltrain.runs.run_folder import sample_rows, write_samples
from rltrain.runs.step_metrics import completion_metrics
from rltrain.runs.trackers.base import readable, typed
from rltrain.runs.turn_metrics import percentile, turn_metrics
from rltrain.types import Completion

PLAIN = Completion(token_ids=(1, 2), logprobs=(-0.5, -0.5), finish="stop", text="ab")


def reduced(*metrics):
    accumulator = Accumulator()
    for each in metrics:
        accumulator.add(each)
    return accumulator.reduce()


def test_metrics_of_turns_by_hand():
    """Five turns of three completions; of the replies one failed and one came too late."""
    expected = {
        "turns/mean": 5 / 3,
        "turns/max": 2,
        "turns/reward": (0.5 - 1.0) / 3,
        "environment/calls": 3 / 3,
        "environment/call_ratio": 2 / 3,
        "environment/errors": 1 / 5,
        "environment/timeouts": 1 / 5,
        "environment/failed_ratio": 1 / 3,
        "environment/latency_p99_s": 8.0,
    }
    assert reduced(turn_metrics([called(), answered(), failed()])) == pytest.approx(expected)
    # The same over two ranks: means are weighed by their counts, the latency is the larger.
    assert reduced(turn_metrics([called()]), turn_metrics([answered(), failed()])) == pytest.approx(expected)


def test_runs_without_turns_have_no_metrics_of_them():
    assert turn_metrics([PLAIN]) == {}
    assert {"turns/mean", "environment/errors"} <= completion_metrics([group(called())]).keys()
    assert not [name for name in completion_metrics([group(PLAIN)]) if name.startswith(("turns/", "environment/"))]


def test_the_percentile_is_of_the_nearest_rank():
    """Of 200 values 198 are at or below the 198th; of fewer than 100 values it is the largest."""
    values = [float(value) for value in range(1, 201)]
    assert (percentile(values[::-1], 0.99), percentile(values[:99], 0.99), percentile([3.0], 0.99)) == (198, 99, 3)


def judged(*completions):
    made = group(*completions)
    object.__setattr__(made, "right_G", made.rewards_G)
    return made


def test_an_evaluation_tells_turns_and_calls():
    values = reduced(group_metrics(judged(answered(), called()), samples=2))
    assert (values["accuracy"], values["turns/mean"], values["environment/call_ratio"]) == (0.5, 1.5, 0.5)
    assert "turns/mean" not in group_metrics(judged(PLAIN, PLAIN), samples=2)


def test_samples_keep_the_conversation_and_its_turns(tmp_path):
    made = group(called(), answered(), failed())
    rows = sample_rows(3, [made], advantages(made), Letters())
    assert [row["completion"] for row in rows] == ["abcd", "be", "aca"]
    assert rows[0]["turn/written"] == [2, 1] and rows[0]["turn/observed"] == [1, 0]
    assert rows[0]["advantages"] == [1.0, 1.0, 0.0, 1.0]
    write_samples(tmp_path, "step_000003", rows)
    read = pq.read_table(tmp_path / "samples" / "step_000003.parquet").to_pylist()
    for again, first in zip(as_group(read).completions, made.completions, strict=True):
        assert (again.turns, again.token_ids, again.text) == (first.turns, first.token_ids, first.text)
        assert [repr(value) for value in again.logprobs] == [repr(value) for value in first.logprobs]


def test_samples_without_turns_have_no_columns_of_them():
    made = group(PLAIN)
    (row,) = sample_rows(3, [made], advantages(made), Letters())
    assert not [name for name in row if name.startswith("turn/")]
    assert typed(row) == row and row["completion"] == "ab"


def test_rows_for_trackers():
    """wandb refuses a list with NaN, or with None in some rows only."""
    made = group(called(), answered())
    row, other = (typed(row) for row in sample_rows(3, [made], advantages(made), Letters()))
    assert row["logprobs"] == [-0.5, -0.25, 0.0, -1.0] and other["logprobs"] == [-0.5, -0.5]
    assert "turn/state_key" not in row
    assert {name: readable(row)[name] for name in ("completion", "turn/reward", "turn/failure")} == {
        "completion": "abcd",
        "turn/reward": [0.5, 0.0],
        "turn/failure": ["", ""],
    }


def test_wandb_takes_a_table_of_turns():
    wandb = pytest.importorskip("wandb")
    made = group(answered(), called(), failed())
    rows = [typed(row) for row in sample_rows(3, [made], advantages(made), Letters())]
    table = wandb.Table(columns=list(rows[0]), log_mode="INCREMENTAL")
    for row in rows:
        table.add_data(*row.values())
    assert len(table.data) == 3
