"""Trackers: each step once over resumed runs, failures as warnings, and what the real packages have read back."""

import json
import logging

import pytest

from rltrain.config import TrackingConfig
from rltrain.errors import ConfigError
from rltrain.runs import trackers
from rltrain.runs.trackers.base import TrackedRun, Tracker, readable
from rltrain.runs.trackers.tensorboard import TensorboardTracker, table
from rltrain.runs.trackers.trackio import TrackioTracker

ROWS = [
    {"sample": g, "prompt": "1+2", "completion": f"<b>{g}</b>|\nx", "answer": "3", "finish": "stop", "reward": 0.5 * g,
     "reward/answer": 0.5 * g, "tokens": ["a"], "advantages": [0.25]}
    for g in range(2)
]  # fmt: skip


def run(folder, **config):
    return TrackedRun(folder=folder, name="method", config=config or {"seed": 3}, tracking=TrackingConfig())


class Listed(Tracker):
    """Keeps what it is sent; a step below zero cannot be sent."""

    name = "listed"

    def _start(self, run):
        self.got = []

    def _log(self, step, values):
        self.got.append((step, dict(values)))
        if values.get("loss", 0) < 0:
            raise OSError("no route to host\nat line 3")

    def _log_samples(self, step, rows):
        self.got.append((step, len(rows)))

    def _finish(self):
        self.got.append("finished")


class Losing(Listed):
    name = "losing"
    loses_on_kill = True


def test_a_resumed_run_sends_what_is_missing_and_nothing_twice(tmp_path):
    first = Listed(run(tmp_path))
    for step in (0, 1, 2, 3):
        first.write(step, {"loss": 1.0 / (step + 1)})
    # Killed; the checkpoint was that of step 2, whose line and those before it are in metrics.jsonl.
    again = Listed(run(tmp_path))
    again.catch_up([{"step": step, "loss": 1.0 / (step + 1)} for step in (0, 1, 2)])
    again.write(3, {"loss": 0.25})
    again.write_samples(3, ROWS)
    again.write(4, {"loss": 0.2})
    again.write_samples(4, ROWS)
    again.close()
    assert [step for step, _ in first.got] == [0, 1, 2, 3]
    assert again.got == [(4, {"loss": 0.2}), (4, 2), "finished"]


def test_a_service_that_may_lose_steps_gets_them_again_unless_it_was_closed(tmp_path):
    killed = Losing(run(tmp_path))
    killed.write(0, {"loss": 1.0})
    again = Losing(run(tmp_path))
    again.catch_up([{"step": 0, "loss": 1.0, "kl": None}])
    again.close()
    assert again.got == [(0, {"loss": 1.0}), "finished"]
    closed = Losing(run(tmp_path))
    closed.catch_up([{"step": 0, "loss": 1.0}])
    assert closed.got == []


def test_a_failure_is_one_warning_and_the_end_of_the_tracker(tmp_path, caplog):
    one = Listed(run(tmp_path))
    with caplog.at_level(logging.WARNING):
        one.write(1, {"loss": -1.0})
        one.write(2, {"loss": 1.0})
        one.close()
    assert [record.message for record in caplog.records] == [
        "listed could not log (no route to host); the run goes on without it"
    ]
    assert one.got == [(1, {"loss": -1.0})]


def test_the_config_chooses(tmp_path):
    assert trackers.started(TrackingConfig(wandb="disabled"), run(tmp_path)) == []


@pytest.mark.parametrize("package", ["tensorboard", "trackio"])
def test_a_missing_package_is_a_line(package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    trackers.check(TrackingConfig())
    with pytest.raises(ConfigError) as refused:
        trackers.check(TrackingConfig(**{package: True}))
    assert str(refused.value) == f"tracking.{package}=true: the package is not installed; pip install {package}"


def test_samples_become_a_table_of_text():
    assert list(readable(ROWS[0])) == ["sample", "prompt", "completion", "answer", "finish", "reward", "reward/answer"]
    assert table([{"completion": "<b>|`x`\n_", "reward": 1 / 3}]) == (
        "| completion | reward |\n|---|---|\n| &lt;b&gt;&#124;&#96;x&#96;<br>&#95; | 0.333333 |"
    )


def test_tensorboards_files_hold_every_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, lines in ((0, []), (3, [0, 1, 2])):
        tracker = TensorboardTracker(run(tmp_path, seed=3))
        tracker.catch_up([{"step": step, "reward": step / 8} for step in lines])
        for step in range(start, start + 4):
            tracker.write(step, {"reward": step / 8, "groups/mixed": 0.5})
            tracker.write_samples(step, ROWS)
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    assert [(one.step, one.value) for one in events.Scalars("reward")] == [(step, step / 8) for step in range(7)]
    assert [one.step for one in events.Scalars("groups/mixed")] == list(range(7))
    texts = events.Tensors("completions/text_summary")
    assert [one.step for one in texts] == list(range(7))
    assert "&lt;b&gt;1&lt;/b&gt;" in texts[0].tensor_proto.string_val[0].decode()
    (config,) = events.Tensors("config/text_summary")
    assert config.tensor_proto.string_val[0].decode() == "```yaml\nseed: 3\n```"


def test_trackio_has_every_step_once_in_one_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    for start, lines in ((0, []), (3, [0, 1, 2])):
        tracker = TrackioTracker(run(tmp_path / "run", seed=3))
        tracker.catch_up([{"step": step, "reward": step / 8} for step in lines])
        for step in range(start, start + 4):
            tracker.write(step, {"reward": step / 8})
            tracker.write_samples(step, ROWS)
        tracker.close()
    assert capsys.readouterr().out == ""
    (kept,) = trackio.Api().runs("rltrain")
    assert kept.name == f"method-{(tmp_path / 'run/trackio_id.txt').read_text()}" and kept.config["seed"] == 3
    logs = trackio.SQLiteStorage.get_logs("rltrain", kept.name, run_id=kept.id)
    assert [(one["step"], one["reward"]) for one in logs if "reward" in one] == [(step, step / 8) for step in range(7)]
    tables = [one["completions"] for one in logs if "completions" in one]
    assert len(tables) == 7 and json.dumps(tables[0]).count("<b>1</b>") == 1
