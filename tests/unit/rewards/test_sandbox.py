"""A worker that is killed, stopped, or eats its memory costs one verdict; nothing outlives its parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rltrain.rewards.sandbox import pool as sandbox
from rltrain.rewards.sandbox.pool import Limits, Pool
from rltrain.rewards.sandbox.program import run_program


def work(kind, value):
    """Runs in the child: the pool is given ``test_sandbox:work``."""
    if kind == "spin":
        while True:
            pass
    if kind == "sleep":
        time.sleep(value)
    if kind == "eat":
        return len(bytearray(value))
    if kind == "digits":
        return len(str(7**value)) and 0  # one C call that holds the GIL
    if kind == "raise":
        raise ValueError("no")
    if kind == "exit":
        os._exit(value)
    if kind == "fork":
        return os.fork()
    if kind == "connect":
        import socket

        socket.create_connection(("127.0.0.1", value), timeout=1)
    return value


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    made = Pool("test_sandbox:work", deadline_s=3.0, item_cpu_s=0.3, limits=Limits(memory_mib=512, cpu_s=60))
    yield made
    slot = made.free.get(timeout=10)
    if slot:
        sandbox.end_child(slot[0])


def child_pid(pool):
    slot = pool.free.get(timeout=10)
    pool.free.put(slot)
    return slot[0].pid


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid):
    """Wait until a process is gone; the wait has a bound so that a failure is a failure."""
    for _ in range(500):
        if not alive(pid):
            return True
        time.sleep(0.02)
    return False


def test_one_child_answers_many_items(pool):
    assert [pool.call("echo", n).value for n in range(5)] == [0, 1, 2, 3, 4]
    pid = child_pid(pool)
    assert pool.call("raise", 0).status == "error"
    assert pool.call("echo", 7).value == 7 and child_pid(pool) == pid


@pytest.mark.parametrize("item", [("spin", 0), ("digits", 10**8)])
def test_processor_time_is_the_items_fault_and_costs_one_item(pool, item):
    assert pool.call(*item).status == "cpu"
    assert pool.call("echo", 1).value == 1


def test_memory_costs_one_item(pool):
    assert pool.call("eat", 100 * 2**30).status == "memory"
    assert pool.call("eat", 2**20).value == 2**20


def test_killed_worker_costs_one_item(pool):
    pool.call("echo", 1)
    os.kill(child_pid(pool), signal.SIGKILL)
    assert pool.call("echo", 2).status == "died"
    assert pool.call("echo", 3).value == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_job_costs_nothing(pool, number):
    """Slurm sends a preempted job's TERM to the workers, too, while the trainer still finishes its step."""
    pool.call("echo", 1)
    before = child_pid(pool)
    os.kill(before, number)
    assert pool.call("echo", 2).value == 2
    assert child_pid(pool) == before


def test_stopped_worker_costs_one_item(pool):
    pool.deadline_s = 0.3
    pool.call("echo", 1)
    stopped = child_pid(pool)
    os.kill(stopped, signal.SIGSTOP)
    assert pool.call("echo", 2).status == "timeout"
    pool.deadline_s = 10.0
    assert pool.call("echo", 3).value == 3
    assert gone(stopped)


def test_exit_inside_the_function_costs_one_item(pool):
    assert pool.call("exit", 0).status == "died"
    assert pool.call("echo", 3).value == 3


def test_no_network_where_the_kernel_allows(pool):
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        reply = pool.call("connect", server.getsockname()[1])
    isolated = subprocess.run(["unshare", "-Un", "true"], capture_output=True).returncode == 0
    assert reply.status == ("error" if isolated else "ok")


def test_batch_deduplicates_and_stops_at_its_deadline(pool):
    pool.deadline_s = 10.0
    replies = pool.map([("echo", 1), ("echo", 1), ("sleep", 1.0), ("echo", 2)], deadline_s=0.7)
    assert [reply.status for reply in replies] == ["ok", "ok", "ok", "skipped"]


def test_callers_wait_for_a_free_worker(pool):
    values = []
    threads = [threading.Thread(target=lambda n=n: values.append(pool.call("echo", n).value)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(values) == list(range(8))
    assert pool.free.qsize() == 1


def test_a_worker_is_replaced_after_its_share_of_items(pool):
    pool.max_items = 2
    pool.call("echo", 1)
    first = child_pid(pool)
    pool.call("echo", 2)
    assert gone(first)
    assert pool.call("echo", 3).value == 3


def test_target_that_cannot_be_imported_is_infrastructure(monkeypatch):
    assert Pool("no_such_module:f").call(1).status == "died"


PARENT = """
import os, signal, sys, threading, time
from rltrain.rewards.sandbox.pool import Pool
pool = Pool("test_sandbox:work", deadline_s=60.0, item_cpu_s=60.0)
pool.call("echo", 1)
slot = pool.free.get(); pool.free.put(slot)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for its background jobs
if sys.argv[1] != "idle":
    threading.Thread(target=pool.call, args=(sys.argv[1], 60), daemon=True).start()
    time.sleep(0.3)
print(slot[0].pid, flush=True)
{end}
"""


@pytest.mark.parametrize("state", ["idle", "spin", "sleep"])
@pytest.mark.parametrize("end", ["kill -9", "interrupt", "exit"])
def test_no_orphan_however_the_parent_ends(state, end):
    last = {"kill -9": "time.sleep(60)", "interrupt": "time.sleep(60)", "exit": "sys.exit(0)"}[end]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    command = [sys.executable, "-c", PARENT.replace("{end}", last), state]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert end == "exit" or alive(pid)
        if end != "exit":
            parent.send_signal(signal.SIGKILL if end == "kill -9" else signal.SIGINT)
        assert gone(pid)


def test_programs_leave_nothing_behind():
    source = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\nprint(os.getpid())\n"
    run = run_program(source, deadline_s=10.0)
    assert run.status == "ok" and int(run.output) > 0
    assert not sandbox._state.children or all(child.poll() is None for child in sandbox._state.children)


def test_a_thousand_hostile_items_leave_no_growth(pool):
    """In short form: 12 items, each of which costs its child; RLTRAIN_HOSTILE=1000 for the whole."""
    pool.call("echo", 1)
    files = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(int(os.environ.get("RLTRAIN_HOSTILE", 12))):
        assert pool.call("exit", number % 256).status == "died"
    assert pool.call("echo", 1).value == 1
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    assert threading.active_count() < 20
