"""wandb through its real client, offline: what it wrote is read back from its own file."""

import json

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


def history(run_dir) -> list[dict]:
    from wandb.proto import wandb_internal_pb2

    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for data in framed(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_wandb_holds_every_step_and_a_table_that_grows(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run_dir = tmp_path / "run"
    trainer.fit(config(run_dir, "tracking.wandb=offline", "tracking.samples_every_steps=1", "steps=2"))
    rows = history(run_dir)
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert rewards == [line["reward"] for line in metrics(run_dir)[1:]]
    tables = [row for row in rows if "completions/nrows" in row]
    assert [table["completions/nrows"] for table in tables] == [16, 32]
    assert [table["completions/log_mode"] for table in tables] == ["INCREMENTAL", "INCREMENTAL"]
    assert [table["completions/increment_num"] for table in tables] == [0, 1]
