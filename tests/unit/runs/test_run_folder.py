"""What a run folder holds beside its numbers: the machine, the log, whose config it is."""

import dataclasses
import json
import logging
import os
from pathlib import Path

import pytest
import torch

from rltrain import cli
from rltrain.config import RunConfig
from rltrain.errors import ConfigError, RunError
from rltrain.runs import checkpoint, log_file, run_folder


def test_provenance_names_the_machine(tmp_path):
    run_folder.write_provenance(tmp_path, cli.compose([]))
    machine = json.loads((tmp_path / "run.json").read_text())["machine"]
    assert machine["host"] == os.uname().nodename
    assert machine["threads"] == torch.get_num_threads()
    assert machine["cores"] == os.cpu_count()
    assert machine["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert machine["kind"].startswith(f"{os.uname().sysname} {os.uname().machine}, ")
    assert machine["cpu"]


def logged(folder) -> list[str]:
    """The lines of the log without their times."""
    return [line.split(" ", 2)[-1] for line in (folder / log_file.FILE).read_text().splitlines()]


def test_the_log_holds_what_was_logged_and_shown_and_a_second_start_is_appended(tmp_path):
    with log_file.kept(tmp_path):
        logging.getLogger("rltrain.somewhere").warning("dropped %d", 3)
        log_file.shown.info("step 1/2")
    logging.getLogger("rltrain.somewhere").warning("outside")
    with pytest.raises(RunError), log_file.kept(tmp_path):
        raise RunError("no reward left")
    first, dropped, step, second, error = logged(tmp_path)
    assert first.startswith("started: python ")
    assert f"(process {os.getpid()}, {os.uname().nodename}, " in first
    assert (dropped, step) == ("dropped 3", "step 1/2")
    assert second.startswith("started: python ")
    assert error == "error: no reward left"


def test_the_log_holds_the_traceback_behind_a_line(tmp_path):
    with pytest.raises(ConfigError), log_file.kept(tmp_path):
        try:
            raise KeyError("lm_head")
        except KeyError as cause:
            raise ConfigError("model.path: cannot be loaded") from cause
    text = (tmp_path / log_file.FILE).read_text()
    assert "error: model.path: cannot be loaded" in text
    assert "KeyError: 'lm_head'" in text


def test_every_key_that_a_resume_is_refused_for_says_why_it_matters():
    groups = {entry.name for entry in dataclasses.fields(RunConfig)}
    assert groups - set(run_folder.FREE_KEYS) <= run_folder.WHY.keys() <= groups


def test_changes_say_why_they_matter():
    before = run_folder.resolved(cli.compose([]))
    after = run_folder.resolved(cli.compose(["loss.clip_low=0.1", "seed=1", "watchdog.save_s=3"]))
    assert run_folder.changes(before, after, ignored=run_folder.FREE_KEYS) == (
        "loss.clip_low: 0.2 -> 0.1 (the gradient before and after would be of different objectives), "
        "seed: 0 -> 1 (every draw depends on it)"
    )


def test_a_folder_with_the_older_number_of_steps_between_looks_goes_on():
    before = run_folder.resolved(cli.compose(["rollout=local", "rollout.check_steps=4"]))
    changed = run_folder.changes(before, run_folder.resolved(cli.compose(["rollout=local"])))
    assert changed.startswith("rollout.check_steps: 4 -> 0 (") and "," not in changed
    after = run_folder.resolved(cli.compose(["rollout=local", "rollout.max_rows=7"]))
    changed = run_folder.changes(before, after, ignored=run_folder.FREE_KEYS)
    assert changed.startswith("rollout.max_rows: 256 -> 7 (") and "," not in changed


def test_a_folder_of_another_config_is_refused_without_a_checkpoint_too(tmp_path):
    run_folder.write_provenance(tmp_path, cli.compose(["steps=3"]))
    assert checkpoint.resume_point(tmp_path, cli.compose(["steps=9", "name=other", "deepspeed.zero_stage=1"])) is None
    with pytest.raises(ConfigError) as error:
        checkpoint.resume_point(tmp_path, cli.compose(["model.hidden_size=64"]))
    assert str(error.value) == (
        f"run_dir={tmp_path}: holds a run of another config (model.hidden_size: 128 -> 64 (the weights and optimiser "
        "state belong to that model)); restore these keys, set another run_dir, or delete the folder"
    )
    with pytest.raises(ConfigError, match="steps: 3 -> 9 .the schedule ends there"):
        checkpoint.resume_point(tmp_path, cli.compose(["steps=9", "optimizer.schedule=linear"]))


@pytest.mark.parametrize("text", ["", "seed: [", "- 3"])
def test_a_torn_config_keeps_nobody_out(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    assert checkpoint.resume_point(tmp_path, cli.compose([])) is None


@pytest.mark.parametrize(("name", "cause"), [
    ("/etc/hostname/x", "Not a directory"), ("/etc/hostname", "File exists"), ("/proc/x", "No such file"),
    ("x" * 300, "File name too long"), ("a\0b", "null"), ("/dev/null/x", "Not a directory"),
])  # fmt: skip
def test_a_folder_that_cannot_be_is_one_line(name, cause, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        cli.make_folder(Path(name))
    assert str(error.value).startswith(f"run_dir={name}: cannot be written to (")
    assert cause in str(error.value)


def test_a_folder_that_can_be_is_left_empty(tmp_path):
    cli.make_folder(tmp_path / "deep" / "run")
    assert list((tmp_path / "deep" / "run").iterdir()) == []
