"""Two runs and one folder: real processes, one of them killed."""

import os
import re
import subprocess
import sys

import pytest
from tiny_run import OVERRIDES, metrics
from two_ranks import ROOT, train
from whole_runs import metrics_if_any, wait_for

from rltrain.runs import lock
from rltrain.sft import LAUNCHER_VARIABLES


def command(folder, *overrides: str, module: str = "rltrain.train") -> list[str]:
    return [sys.executable, "-m", module, *OVERRIDES, f"run_dir={folder}", *overrides]


def run(folder, *overrides: str, module: str = "rltrain.train", **variables: str) -> subprocess.CompletedProcess:
    # A run inside this process left the launcher's variables behind.
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return subprocess.run(
        command(folder, *overrides, module=module), cwd=ROOT, env=inherited | variables, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


def last_line(result: subprocess.CompletedProcess) -> str:
    return result.stderr.strip().splitlines()[-1]


def test_a_second_run_is_refused_and_after_kill_9_the_next_goes_on(tmp_path):
    folder = tmp_path / "run"
    first = subprocess.Popen(command(folder, "steps=100000"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(metrics_if_any(folder)) > 4, first)
        second = run(folder)
        assert second.returncode == 2
        assert last_line(second).startswith(
            f"config error: run_dir={folder}: in use by process {first.pid} on {os.uname().nodename} since "
        )
    finally:
        first.kill()
        first.communicate()
    done = len(metrics(folder))
    third = run(folder, f"steps={done + 3}")
    assert third.returncode == 0, third.stderr
    assert f"the lock of process {first.pid} on " in third.stderr
    assert not (folder / lock.FILE).exists()
    steps = [line["step"] for line in metrics(folder)]
    assert steps == sorted(set(steps))
    log = (folder / "log.txt").read_text()
    assert len(re.findall(r"started: python -m rltrain.train ", log)) == 2  # the refused run wrote nothing
    assert f"step {done + 3}/{done + 3}  reward " in log


@pytest.mark.parametrize("module", ["rltrain.train", "rltrain.sft", "rltrain.compress"])
def test_all_that_write_a_folder_in_turns_respect_its_lock(tmp_path, module):
    (tmp_path / "run").mkdir()
    with lock.held(tmp_path / "run"):
        result = run(tmp_path / "run", "cold_start.steps=1", module=module)
    assert result.returncode == 2
    assert f"config error: run_dir={tmp_path / 'run'}: in use by process {os.getpid()} on " in last_line(result)


def test_two_ranks_have_one_lock(tmp_path):
    folder = tmp_path / "run"
    with lock.held(folder):
        refused = train(folder, 2, "steps=1")
    assert refused.returncode != 0
    assert f"config error: run_dir={folder}: in use by process {os.getpid()} on " in refused.stderr
    assert list(folder.iterdir()) == []
    result = train(folder, 2, "steps=1")
    assert result.returncode == 0, result.stderr
    assert not (folder / lock.FILE).exists()
    assert (folder / "log.txt").read_text().count("started: ") == 1


def test_a_failed_run_s_folder_takes_no_other_model(tmp_path):
    """It has samples and no checkpoint: another model's would mix with them."""
    folder, failing = tmp_path / "run", ["max_zero_signal_steps=1", "reward@rewards.answer=boxed"]
    failing += [one for one in OVERRIDES if not one.startswith(("reward@", "checkpoint.every"))]
    failed = subprocess.run(
        [sys.executable, "-m", "rltrain.train", *failing, "checkpoint.every_steps=0", f"run_dir={folder}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert failed.returncode == 1, failed.stderr
    assert "max_zero_signal_steps" in (folder / "log.txt").read_text()
    other = run(folder, "model.layers=1")
    assert other.returncode == 2
    assert f"config error: run_dir={folder}: holds a run of another config (" in last_line(other)
    assert last_line(other).endswith("restore these keys, set another run_dir, or delete the folder")


def test_a_model_that_cannot_be_loaded_leaves_no_config_behind(tmp_path):
    """The next command, with its path mended, is not one for another folder."""
    failed = run(tmp_path / "run", "model.path=nowhere")
    assert failed.returncode == 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["log.txt"]
    assert "error: model.path=nowhere: no such folder" in (tmp_path / "run" / "log.txt").read_text()


def test_python_in_an_allocation_without_srun_is_told_so(tmp_path):
    result = run(tmp_path / "run", SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_JOB_ID="1234")
    assert result.returncode == 2, result.stderr
    assert last_line(result).startswith("config error: SLURM_NTASKS=2: this process was not started by srun")
    assert not (tmp_path / "run").exists()


def test_an_impossible_run_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    result = run(tmp_path / "file" / "run")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1] == (
        f"config error: run_dir={tmp_path / 'file' / 'run'}: cannot be written to (Not a directory); "
        "set run_dir to a folder that this user can write to"
    )
