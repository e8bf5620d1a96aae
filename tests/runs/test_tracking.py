"""wandb through its real client, offline: what it wrote is read back from its own file."""

import json
import time

import pyarrow.parquet as pq
import pytest
from tiny_run import config, metrics

from rltrain import trainer


def framed(data: bytes) -> list[bytes]:
    """The records of wandb's own file: LevelDB's log format after a header of 7 bytes."""
    position, records, pieces = 7, [], b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        pieces += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            records.append(pieces)
            pieces = b""
    return records


def records(run_dir, kind: str) -> list:
    """All of one kind, over the pieces of a run in the order they were started."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for data in framed(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == kind:
                found.append(getattr(record, kind))
    return found


def values(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def history(run_dir) -> list[dict]:
    return [values(record.item) for record in records(run_dir, "history")]


def train(run_dir, *, steps: int) -> None:
    overrides = ["tracking.wandb=offline", "tracking.samples_every_steps=1", "tracking.group=sweep", "name=method"]
    trainer.fit(config(run_dir, *overrides, f"steps={steps}"))
    # wandb's own process closes its file a moment after ``finish`` has returned.
    pieces, end = len(list(run_dir.glob("wandb/offline-run-*"))), time.monotonic() + 60
    while len(records(run_dir, "exit")) < pieces and time.monotonic() < end:
        time.sleep(0.1)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """One run for all tests; the last two go on with it."""
    folder = tmp_path_factory.mktemp("tracking") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_MODE", raising=False)
        train(folder, steps=2)
    return folder


def test_wandb_holds_every_step_and_a_table_that_grows(run_dir):
    rows = history(run_dir)
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert rewards == [line["reward"] for line in metrics(run_dir)[1:]]
    tables = [row for row in rows if "completions/nrows" in row]
    assert [table["completions/nrows"] for table in tables] == [16, 32]
    assert [table["completions/log_mode"] for table in tables] == ["INCREMENTAL", "INCREMENTAL"]
    assert [table["completions/increment_num"] for table in tables] == [0, 1]


def test_the_table_holds_what_the_samples_hold(run_dir):
    """Each token's advantage and log-prob, as in the run's own parquet files."""
    logged = [row for row in history(run_dir) if "completions/path" in row]
    for step, row in enumerate(logged, 1):
        (path,) = run_dir.glob(f"wandb/offline-run-*/files/{row['completions/path']}")
        table = json.loads(path.read_text())
        cells = [dict(zip(table["columns"], one, strict=True)) for one in table["data"]]
        kept = pq.read_table(run_dir / f"samples/step_{step:06d}.parquet").to_pylist()
        for name in ("completion", "reward", "tokens", "advantages", "logprobs"):
            assert [one[name] for one in cells] == [one[name] for one in kept]
        assert len(cells) == 16 and any(any(one["advantages"]) for one in cells)


def test_wandb_knows_the_sweep_the_config_and_the_machine(run_dir):
    (run,) = records(run_dir, "run")
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("rltrain", "sweep", "train", "method")
    settings = values(run.config.update)
    assert settings["advantage"]["kind"] == "group"
    assert (settings["seed"], settings["steps"], settings["batch"]["group_size"]) == (0, 2, 4)
    (metric,) = records(run_dir, "metric")
    assert (metric.name, metric.summary.last, metric.summary.max) == ("eval_accuracy", True, True)
    accuracies = [line["eval_accuracy"] for line in metrics(run_dir) if "eval_accuracy" in line]
    last = [values(record.update) for record in records(run_dir, "summary")]
    assert next(one["eval_accuracy"] for one in reversed(last) if "eval_accuracy" in one) == {
        "last": accuracies[-1],
        "max": max(accuracies),
    }
    measured = {item.key for record in records(run_dir, "stats") for item in record.item}
    assert "memory_percent" in measured  # rates, such as cpu, need a second sample, which a short run may not see


def test_a_resumed_run_goes_on_in_the_same_wandb_run(run_dir, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    train(run_dir, steps=3)
    first, second = records(run_dir, "run")
    assert first.run_id == second.run_id == (run_dir / "wandb_id.txt").read_text()
    assert values(second.config.update)["steps"] == 3
    steps = [row["_step"] for row in history(run_dir)]
    assert sorted(set(steps)) == [0, 1, 2, 3]
    lines = {line["step"]: line for line in metrics(run_dir)}
    assert all(row["reward"] == lines[row["_step"]]["reward"] for row in history(run_dir) if "reward" in row)


def test_steps_that_an_end_by_force_may_have_cost_are_logged_again(run_dir, monkeypatch):
    """Without the mark of a regular end, wandb's own file may lack the last steps; syncing keeps each step once."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (run_dir / "wandb_step.txt").unlink()
    pieces = len(history(run_dir))
    train(run_dir, steps=4)
    assert [row["_step"] for row in history(run_dir)[pieces:]] == [0, 1, 2, 3, 4]
