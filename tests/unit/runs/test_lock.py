"""A lock keeps a second run out of a folder, and a run that is gone keeps nobody out."""

import dataclasses
import json
import logging
import os
import subprocess
import sys

import pytest

from rltrain.errors import ConfigError, RunError
from rltrain.runs import lock

ELSEWHERE = {"host": "node7", "machine": "node7 another-boot pid:[1]", "pid": 4242, "since": "2026-01-02 03:04:05 UTC"}


def write(folder, *, age_s: float = 0.0, **changed) -> None:
    """A lock that another process left, refreshed ``age_s`` ago."""
    holder = dataclasses.replace(lock.here(), token="another", **changed)
    (folder / lock.FILE).write_text(json.dumps(dataclasses.asdict(holder)))
    now = (folder / lock.FILE).stat().st_mtime
    os.utime(folder / lock.FILE, (now - age_s, now - age_s))


@pytest.fixture
def ended_process():
    """A process of this machine that was killed and that its parent has not waited for: a zombie."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    holder = {"pid": process.pid, "process_start": lock._process_start(process.pid)}
    assert holder["process_start"] is not None
    assert lock.is_alive(dataclasses.replace(lock.here(), **holder))
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    yield holder
    process.wait()


def test_the_block_holds_the_lock_and_leaves_nothing(tmp_path):
    with lock.held(tmp_path / "new" / "run"):
        holder = lock.read(tmp_path / "new" / "run" / lock.FILE)
        assert holder is not None
        assert (holder.pid, holder.host) == (os.getpid(), os.uname().nodename)
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_it_is_released_when_the_run_ends_with_an_error(tmp_path):
    with pytest.raises(SystemExit), lock.held(tmp_path):
        raise SystemExit(75)
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_of_this_machine_is_refused(tmp_path):
    with lock.held(tmp_path):
        with pytest.raises(ConfigError) as error, lock.held(tmp_path):
            pass
        assert (tmp_path / lock.FILE).exists()
    assert f"run_dir={tmp_path}: in use by process {os.getpid()} on {os.uname().nodename} since 2" in str(error.value)
    assert str(error.value).endswith(
        "end that run or set another run_dir; a lock that nobody refreshes is free after 60 s"
    )
    assert "\n" not in str(error.value)


def test_a_run_of_another_machine_is_refused_while_it_refreshes(tmp_path):
    write(tmp_path, age_s=50, **ELSEWHERE)
    with pytest.raises(ConfigError, match="in use by process 4242 on node7 since 2026-01-02 03:04:05 UTC"):
        lock.acquire(tmp_path)


def taken_over(folder, caplog) -> str:
    """The warning with which the lock is taken over."""
    with caplog.at_level(logging.WARNING), lock.held(folder):
        holder = lock.read(folder / lock.FILE)
        assert holder is not None
        assert holder.token != "another"
    assert list(folder.iterdir()) == []
    (record,) = caplog.records
    return record.getMessage()


def test_one_that_nobody_refreshes_is_taken_over(tmp_path, caplog):
    write(tmp_path, age_s=70, **ELSEWHERE)
    assert taken_over(tmp_path, caplog) == (
        f"{tmp_path}: the lock of process 4242 on node7 since 2026-01-02 03:04:05 UTC is taken over: "
        "not refreshed for 70 s"
    )


def test_one_of_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path, caplog, ended_process):
    write(tmp_path, **ended_process)
    assert taken_over(tmp_path, caplog).endswith("is taken over: that process is dead")


def test_a_pid_that_another_process_has_by_now_is_dead(tmp_path, caplog):
    write(tmp_path, pid=os.getpid(), process_start="1")
    assert taken_over(tmp_path, caplog).endswith("is taken over: that process is dead")


def test_a_dead_pid_of_another_machine_says_nothing(tmp_path, ended_process):
    write(tmp_path, **(ELSEWHERE | ended_process))
    with pytest.raises(ConfigError, match="on node7"):
        lock.acquire(tmp_path)


def test_one_of_the_same_slurm_job_is_taken_over(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    write(tmp_path, **ELSEWHERE, slurm_job="77")
    assert taken_over(tmp_path, caplog).endswith("is taken over: it is of this Slurm job, 77")
    write(tmp_path, **ELSEWHERE, slurm_job="78")
    with pytest.raises(ConfigError, match="on node7"):
        lock.acquire(tmp_path)


def test_two_runs_of_one_slurm_job_on_one_machine_are_two_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    write(tmp_path)
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        lock.acquire(tmp_path)


@pytest.mark.parametrize("pid", ["x", None, 1.5, -1, 0, 2**70])
def test_a_damaged_lock_counts_by_its_age(tmp_path, caplog, pid):
    write(tmp_path, pid=pid)
    with pytest.raises(ConfigError, match="in use by a process that has not written its name"):
        lock.acquire(tmp_path)
    write(tmp_path, pid=pid, age_s=70)
    assert "a process that has not written its name is taken over: not refreshed for 70" in taken_over(tmp_path, caplog)


def test_a_process_whose_start_is_hidden_counts_as_alive(monkeypatch):
    """As another user's does under hidepid."""

    def refuse(pid, signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert lock.is_alive(dataclasses.replace(lock.here(), process_start="1"))


def test_a_lock_that_is_released_while_it_is_read_is_free(tmp_path, monkeypatch):
    first, read = lock.acquire(tmp_path), lock.read

    def release_then_read(path):
        monkeypatch.setattr(lock, "read", read)
        first.release()
        return read(path)

    monkeypatch.setattr(lock, "read", release_then_read)
    lock.acquire(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_torn_lock_counts_by_its_age(tmp_path, caplog):
    (tmp_path / lock.FILE).write_text("{")
    with pytest.raises(ConfigError, match="in use by a process that has not written its name"):
        lock.acquire(tmp_path)
    (tmp_path / lock.FILE).write_text("{")
    os.utime(tmp_path / lock.FILE, (1, 1))
    assert "a process that has not written its name is taken over: not refreshed for" in taken_over(tmp_path, caplog)


def test_a_run_that_lost_its_lock_ends_and_leaves_the_other_s(tmp_path):
    lost = pytest.raises(RunError, match=r"taken over by process 4242 on node7 .* while this run stood still")
    with lost, lock.held(tmp_path):
        lock.refuse_if_lost(tmp_path)
        write(tmp_path, **ELSEWHERE)
        lock.refuse_if_lost(tmp_path)
    holder = lock.read(tmp_path / lock.FILE)
    assert holder is not None
    assert holder.token == "another"


def test_a_run_whose_lock_is_gone_ends(tmp_path):
    with lock.held(tmp_path):
        lock.refuse_if_lost(tmp_path)
        (tmp_path / lock.FILE).unlink()
        with pytest.raises(RunError) as caught:
            lock.refuse_if_lost(tmp_path)
    assert str(caught.value) == (
        f"run_dir={tmp_path}: its lock.json is gone: another run took the folder and ended, or it was deleted; "
        "this one ends, the same command goes on from the last checkpoint"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_refreshed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "REFRESH_S", 0.01)
    with lock.held(tmp_path):
        os.utime(tmp_path / lock.FILE, (1, 1))
        while (tmp_path / lock.FILE).stat().st_mtime == 1:
            pass


def test_a_folder_that_nobody_holds_is_nobody_s_loss(tmp_path):
    lock.refuse_if_lost(tmp_path)
