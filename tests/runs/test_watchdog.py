"""Waits that never end: real processes that are stopped, killed or stuck end with the name of what they waited for."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_run import OVERRIDES

from rltrain.errors import ConfigError, RunError
from rltrain.runtime import watchdog
from rltrain.runtime.watchdog import EXIT_DEADLINE, Wait, WatchdogConfig, describe, waiting

ROOT = Path(__file__).parents[2]
PARTS = Path(__file__).parents[1] / "helpers" / "hanging_parts.py"
GENEROUS_S = 240


def start(command, folder, *overrides, **variables) -> subprocess.Popen:
    arguments = [*OVERRIDES, f"run_dir={folder}", "evaluation.every_steps=0", *overrides]
    return subprocess.Popen(
        [sys.executable, *command, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def two_ranks(folder, *overrides):
    """Two ranks without a launcher, which would end one itself when the other dies; both in the middle of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        start(["-m", "rltrain.train"], folder, *overrides, "steps=100000", "checkpoint.every_steps=0",
              RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in range(2)
    ]  # fmt: skip
    try:
        wait_for_steps(folder / "metrics.jsonl", ranks)
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def wait_for_steps(path, processes):
    end = time.monotonic() + GENEROUS_S
    while not path.exists() or path.read_text().count("\n") < 2:
        for process in processes:
            assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "the run did not get there"
        time.sleep(0.1)


def record_of(folder) -> dict:
    (path,) = (folder / "crashes").glob("*_rank0.json")
    return json.loads(path.read_text())


def test_a_stopped_rank_ends_the_other(tmp_path):
    with two_ranks(tmp_path / "run", "deadline_s=3", "watchdog.join_s=200") as (first, second):
        second.send_signal(signal.SIGSTOP)
        _, errors = first.communicate(timeout=GENEROUS_S)
    assert first.returncode == EXIT_DEADLINE
    record = record_of(tmp_path / "run")
    assert f"error: {record['message']}" in errors
    assert re.match(r"rank 0: waited \d+ s for '.+' \(deadline 3 s\)", record["message"])
    assert any(wait["deadline_s"] == 3 and wait["waited_s"] >= 3 for wait in record["waits"])
    assert "in train\n" in errors  # of the main thread's stack
    assert any("in train\n" in frame for frame in record["stacks"]["MainThread"])


def test_a_killed_rank_ends_the_other(tmp_path):
    """Long before the deadline: a closed connection is noticed."""
    with two_ranks(tmp_path / "run", "deadline_s=200") as (first, second):
        second.kill()
        _, errors = first.communicate(timeout=GENEROUS_S)
    assert first.returncode == EXIT_DEADLINE
    record = record_of(tmp_path / "run")
    assert f"error: {record['message']}" in errors
    assert re.match(r"rank 0: waited \d+ s for '.+': .*gloo", record["message"])


@pytest.mark.parametrize(("command", "override", "waits", "frame"), [
    ("train", "rollout=hanging", ["rollout of step 1"], "in generate"),
    ("evaluate", "reward@rewards.more=sleeping", ["evaluation", "reward more"], "in sleeping"),
])  # fmt: skip
def test_a_part_that_hangs_ends_the_run(tmp_path, command, override, waits, frame):
    limits = ["watchdog.rollout_s=2", "watchdog.evaluation_s=2"]
    process = start([str(PARTS), command], tmp_path / "run", f"+{override}".replace("+rollout", "rollout"), *limits)
    _, errors = process.communicate(timeout=GENEROUS_S)
    assert process.returncode == EXIT_DEADLINE, errors
    assert re.search(rf"rank 0: waited \d+ s for '{waits[0]}' \(deadline 2 s\)", errors)
    assert frame in errors
    assert [one["name"] for one in record_of(tmp_path / "run")["waits"]] == waits


def run_python(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"import ctypes, pathlib, time\nfrom rltrain.runtime.watchdog import *\n{code}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=GENEROUS_S)


def test_c_code_that_holds_the_interpreter_lock_is_ended_too(tmp_path):
    """No Python thread can run then; faulthandler's own thread dumps the stacks and exits with 1."""
    code = f"""
def stuck():
    ctypes.PyDLL(None).sleep(1000)
with armed(pathlib.Path({str(tmp_path)!r}), rank=0), waiting("a kernel", 1.0):
    time.sleep(0.7)  # the thread has seen the wait
    stuck()
"""
    result = run_python(code)
    assert result.returncode == 1
    assert "in stuck" in result.stderr


def test_what_can_be_saved_is_saved_and_the_rest_is_said(tmp_path):
    code = f"""
def save():
    pathlib.Path({str(tmp_path)!r}, "saved").write_text("all")
    return "all"
with armed(pathlib.Path({str(tmp_path)!r}), rank=3), rescues(lambda: 1 / 0), rescues(save):
    with waiting("outer"), waiting("gold", 0.1), waiting("inner"):
        time.sleep(1000)
"""
    result = run_python(code)
    assert result.returncode == EXIT_DEADLINE
    assert re.search(r"rank 3: waited \d+ s for 'gold' \(deadline 0.1 s\), inside 'outer', at 'inner'", result.stderr)
    assert "rank 3: saved nothing (ZeroDivisionError: division by zero)" in result.stderr
    assert (tmp_path / "saved").read_text() == "all"
    assert len(list((tmp_path / "crashes").glob("*_rank3.json"))) == 1


def test_waits_that_end_in_time_leave_nothing(tmp_path):
    with watchdog.armed(tmp_path, rank=0):
        for _ in range(3):
            with waiting("quick", 0.6):
                time.sleep(0.3)
        with waiting("no limit", 0):
            time.sleep(1.2)
    assert list(tmp_path.iterdir()) == []
    assert not watchdog.is_armed()


def test_an_error_of_its_own_keeps_its_type_and_leaves_no_record(tmp_path):
    with pytest.raises(RunError, match="ours"), watchdog.armed(tmp_path, rank=0), waiting("x", 5):
        raise RunError("ours")
    assert list(tmp_path.iterdir()) == []


def test_the_message_names_the_wait_its_surroundings_and_the_seconds():
    now = time.monotonic()
    waits = [
        Wait(name=name, deadline_s=limit, start_s=now - 7, thread=0) for name, limit in (("a", 9), ("b", 7), ("c", 0))
    ]
    assert describe(waits[1], waits) == "waited 7 s for 'b' (deadline 7 s), inside 'a', at 'c'"


def test_work_that_was_not_reckoned_with_extends_the_open_waits_of_its_thread():
    other, leave = threading.Event(), threading.Event()

    def wait_elsewhere():
        with waiting("elsewhere", 3) as wait:
            elsewhere.append(wait)
            other.set()
            leave.wait(60)

    elsewhere: list[Wait] = []
    thread = threading.Thread(target=wait_elsewhere)
    thread.start()
    assert other.wait(60)
    with waiting("outer", 5) as outer, waiting("named only", 0) as named, waiting("inner", 2) as inner:
        watchdog.extend(7)
        assert (outer.deadline_s, named.deadline_s, inner.deadline_s) == (12, 0, 9)
        assert elsewhere[0].deadline_s == 3
    leave.set()
    thread.join()


def test_deadlines_must_not_be_negative():
    with pytest.raises(ConfigError, match=r"watchdog.save_s=-1: must be >= 0; 0 sets no deadline"):
        WatchdogConfig(save_s=-1)
