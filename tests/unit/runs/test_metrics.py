"""Metrics of parts of a batch, merged, are those of the whole batch; the metrics file survives a kill."""

import json
import statistics

import pytest
import torch

from rltrain.runs.metrics import Accumulator, JsonlWriter, read_jsonl
from rltrain.types import Max, Mean, Min, Std, Sum

VALUES = [0.25, 1.0, 0.0, 7.5, -2.0, 0.1]


def reduced(*parts) -> dict[str, float]:
    accumulator = Accumulator()
    for part in parts:
        accumulator.add(part)
    return accumulator.reduce()


@pytest.mark.parametrize("cut", range(len(VALUES) + 1))
def test_merged_parts_equal_the_whole(cut):
    """Whatever share of a batch a micro-batch or a rank has, an empty one included."""
    parts = [{"mean": Mean.of(part), "std": Std.of(torch.tensor(part))} for part in (VALUES[:cut], VALUES[cut:])]
    values = reduced(*parts)
    assert values["mean"] == pytest.approx(statistics.mean(VALUES))
    assert values["std"] == pytest.approx(statistics.stdev(VALUES), rel=1e-6)


def test_equal_values_have_no_deviation():
    same = {"std": Std.of(torch.full((3,), 0.1))}
    assert reduced(same, same)["std"] == 0.0
    assert reduced({"std": Std.of(torch.tensor([4.0]))})["std"] == 0.0


def test_nothing_is_left_out_and_extremes_and_sums_merge():
    empty = {"mean": Mean.of([]), "std": Std.of(torch.zeros(0))}
    assert reduced(empty, empty) == {}
    first = {"max": Max(value=2.0), "min": Min(value=2.0), "sum": Sum(value=2.0)}
    second = {"max": Max(value=5.0), "min": Min(value=5.0), "sum": Sum(value=5.0)}
    assert reduced(first, second) == {"max": 5.0, "min": 2.0, "sum": 7.0}


def test_a_resumed_file_drops_the_lines_that_are_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, resume_step=-1)
    for step in range(4):
        writer.write(step, {"reward": step / 4, "loss": float("nan")})
    with path.open("a") as file:
        file.write('{"step": 4, "rew')  # torn by a kill
    JsonlWriter(path, resume_step=2).write(3, {"reward": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]
    assert read_jsonl(path)[2:] == [{"step": 2, "reward": 0.5, "loss": None}, {"step": 3, "reward": 1.0}]
