"""Untrusted work in killable child processes: a pool for one trusted function, and a runner for programs.

The parent keeps every deadline and ends a child with SIGKILL, because a thread cannot be stopped, and SIGALRM needs the
main thread and does not interrupt C. A single long-lived thread starts all children, because the kernel's parent-death
signal follows the thread that forked. Children have a session and an environment of their own, and end when the run
ends, also by kill -9. Pools can be used from any thread and after a fork. Nothing is started before its first use.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import math
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

_CHILD = str(Path(__file__).resolve().with_name("child.py"))
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",  # the order of a set of strings is the same each time
}
START_DEADLINE_S = 60.0
_REPLY_BYTES = 2**20
log = logging.getLogger("rltrain.sandbox")

ReplyStatus = Literal["ok", "error", "memory", "cpu", "timeout", "died", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits of one child (``setrlimit``)."""

    memory_mib: int = 1024
    cpu_s: int = 10
    processes: int = 32
    file_mib: int = 16


@dataclass(frozen=True, kw_only=True)
class ChildReply:
    """The outcome of an item.

    ``ok`` and ``error`` come from the function. ``memory`` and ``cpu``: the item used up its share. ``timeout``: the
    deadline passed although the item had processor time left, as in a stopped child or one that is still starting.
    ``died``: the child was killed from outside or could not start. ``skipped``: the batch deadline passed before the
    item's turn.
    """

    status: ReplyStatus
    value: Any = None


# --- starting children -------------------------------------------------------------------------------------------


class _Spawner:
    """The thread that forks all children, so that a parent-death signal means the death of the process."""

    def __init__(self) -> None:
        self.requests: queue.SimpleQueue[tuple[list[str], dict[str, str], Future[subprocess.Popen[bytes]]]]
        self.requests = queue.SimpleQueue()
        threading.Thread(target=self._loop, name="rltrain-sandbox-spawner", daemon=True).start()

    def _loop(self) -> None:
        # Children inherit the mask. Slurm signals all processes of a job, but the current step needs the children.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
        while True:
            command, variables, future = self.requests.get()
            try:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=variables,
                    start_new_session=True,
                    bufsize=0,
                )
                future.set_result(child)
            except Exception as error:
                future.set_exception(error)

    def start(self, mode: str, config: dict[str, Any]) -> subprocess.Popen[bytes]:
        # -I without -E, because the environment is made here: no folder of a script or of a user is on the path.
        command = [sys.executable, "-P", "-s", _CHILD, mode, json.dumps(config | {"parent": os.getpid()})]
        future: Future[subprocess.Popen[bytes]] = Future()
        self.requests.put((command, _variables(config), future))
        return future.result(START_DEADLINE_S)


def _variables(config: dict[str, Any]) -> dict[str, str]:
    """The environment variables of a child: few, or the run's too, without Python's, where it has the network."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return _ENVIRONMENT | (inherited if config.get("network") else {})


class _State:
    """The children and pools of this process. A forked process starts with none."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.spawner: _Spawner | None = None
        self.children: set[subprocess.Popen[bytes]] = set()
        self.pools: dict[str, Pool] = {}
        self.described: set[str] = set()


_state = _State()


def _forget() -> None:
    global _state
    _state = _State()


os.register_at_fork(after_in_child=_forget)


def start_child(mode: str, config: dict[str, Any]) -> subprocess.Popen[bytes]:
    """A child in ``mode``, started by the thread that forks. Its standard input is non-blocking."""
    with _state.lock:
        if _state.spawner is None:
            _state.spawner = _Spawner()
        child = _state.spawner.start(mode, config)
        _state.children.add(child)
    os.set_blocking(child.stdin.fileno(), False)  # pyright: ignore[reportOptionalMemberAccess]
    return child


def end_child(child: subprocess.Popen[bytes]) -> int:
    """SIGKILL the child's process group, reap it, and return its exit code."""
    finished = child.poll()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    code = child.wait() if finished is None else finished
    for stream in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):
            stream.close()  # pyright: ignore[reportOptionalMemberAccess]
    with _state.lock:
        _state.children.discard(child)
    return code


def close_all() -> None:
    """End every child of this process."""
    for child in list(_state.children):
        end_child(child)
    _state.pools.clear()


atexit.register(close_all)


def describe(what: str, active: Sequence[str]) -> None:
    """Log once per process which protections are active."""
    if what not in _state.described:
        _state.described.add(what)
        all_names = ["memory", "cpu", "file size", "process count", "no network"]
        all_names += ["not root", "own process tree", "own file system"] if what == "programs" else []
        missing = [name for name in all_names if name not in active] or ["nothing"]
        log.info("sandbox for %s: active: %s; not available here: %s", what, ", ".join(active), ", ".join(missing))


# --- talking to children -----------------------------------------------------------------------------------------


def exchange(
    child: subprocess.Popen[bytes], request: bytes, deadline: float, *, limit: int, one_line: bool
) -> tuple[bytes, str]:
    """Send ``request``, read until a line (or the end). Returns the bytes and ``ok | end | timeout | output``."""
    assert child.stdin and child.stdout
    source, sink = child.stdout.fileno(), child.stdin.fileno()
    poll = select.poll()
    poll.register(source, select.POLLIN | select.POLLHUP)
    received, pending = bytearray(), memoryview(request)
    if pending:
        poll.register(sink, select.POLLOUT)
    while True:
        left_ms = int(1000 * (deadline - time.monotonic()))
        events = poll.poll(left_ms) if left_ms > 0 else []
        if not events:
            return bytes(received), "timeout"
        for descriptor, event in events:
            if descriptor == sink:
                pending = _send(sink, pending, poll, event)
                continue
            chunk = os.read(source, 65536)
            received += chunk
            if not chunk:
                return bytes(received), "end"
            if one_line and chunk.endswith(b"\n"):
                return bytes(received), "ok"
            if len(received) > limit:
                return bytes(received[:limit]), "output"


def _send(sink: int, pending: memoryview, poll: select.poll, event: int) -> memoryview:
    try:
        pending = memoryview(b"") if event & (select.POLLERR | select.POLLHUP) else pending[os.write(sink, pending) :]
    except BrokenPipeError:
        pending = memoryview(b"")
    if not pending:
        poll.unregister(sink)
    return pending


# --- a pool for one function -------------------------------------------------------------------------------------


class Pool:
    """``workers`` persistent children that apply ``target`` ("module:function") to JSON arguments.

    An item may use ``item_cpu_s`` of processor time (enforced by the kernel) and ``deadline_s`` of wall clock
    (enforced here). Callers wait for a free worker, so that no queue grows. A child that fails costs its item, and a
    new child is started in the background at once. After ``max_items`` a child is replaced, so that caches do not grow.
    A child calls the function ``prepare`` of the target's module with ``prepared_with`` before it takes items. With
    ``network`` it keeps the network and the environment variables of this process. A reply of more than ``reply_bytes``
    as JSON is a ``timeout``.
    """

    def __init__(
        self,
        target: str,
        *,
        workers: int = 1,
        deadline_s: float = 2.0,
        item_cpu_s: float = 0.7,
        max_items: int = 2000,
        limits: Limits | None = None,
        prepare: str = "",
        prepared_with: Sequence[Any] = (),
        network: bool = False,
        reply_bytes: int = _REPLY_BYTES,
    ) -> None:
        self.reply_bytes = reply_bytes
        self.deadline_s, self.max_items, self.workers = deadline_s, max_items, workers
        limits = limits or Limits(cpu_s=max_items, processes=1)
        self.config = asdict(limits) | {
            "target": target,
            "item_cpu_s": item_cpu_s,
            "path": sys.path,
            "prepare": prepare,
            "prepared_with": list(prepared_with),
            "network": network,
        }
        self.free: queue.LifoQueue[tuple[subprocess.Popen[bytes], int] | str] = queue.LifoQueue()
        self.lock = threading.Lock()
        self.absent, self.busy, self.closed = workers, 0, False

    def warm(self) -> None:
        """Start a child in the background, if one is missing and none is free."""
        with self.lock:
            if self.closed or not self.absent or not self.free.empty():
                return
            self.absent -= 1
        threading.Thread(target=self._fill, name="rltrain-sandbox-start", daemon=True).start()

    def _fill(self) -> None:
        """Put a new child, or the reason why there is none, where callers wait."""
        try:
            self.free.put((self._new(), 0))
        except Exception as error:
            log.warning("sandbox: %s", error)
            with self.lock:
                self.absent += 1
            self.free.put(f"{type(error).__name__}: {error}")

    def is_ready(self, wait_s: float) -> bool:
        """Wait until a child is ready to take items."""
        end = time.monotonic() + wait_s
        self.warm()
        while time.monotonic() < end:
            try:
                slot = self.free.get(timeout=max(end - time.monotonic(), 0.001))
            except queue.Empty:
                break
            if not isinstance(slot, str):
                self.free.put(slot)
            return not isinstance(slot, str)
        return False

    def call(self, *arguments: Any, wait_s: float = 60.0, total_s: float = math.inf) -> ChildReply:
        """Apply the function in a child; never raises. Waits at most ``wait_s`` for a child that is free or starting.

        ``total_s`` bounds the waiting and the item together.
        """
        end = time.monotonic() + total_s
        self.warm()
        try:
            slot = self.free.get(timeout=max(min(wait_s, total_s), 0.0))
        except queue.Empty:
            return ChildReply(status="skipped" if self.busy else "timeout", value="no child was ready")
        if isinstance(slot, str):
            return ChildReply(status="died", value=slot)
        kept = None
        with self.lock:
            self.busy += 1
        try:
            child, used = slot
            reply = self._ask(child, arguments, min(time.monotonic() + self.deadline_s, end))
            if reply.status in ("ok", "error") and used + 1 < self.max_items and not self.closed:
                kept = (child, used + 1)
            elif reply.status != "died":
                end_child(child)
            return reply
        except Exception as error:
            return ChildReply(status="died", value=f"{type(error).__name__}: {error}")
        finally:
            self._give_back(kept)

    def close(self) -> None:
        """End the children that are free; those at work end with their items."""
        self.closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                slot = self.free.get_nowait()
                if not isinstance(slot, str):
                    end_child(slot[0])

    def _give_back(self, kept: tuple[subprocess.Popen[bytes], int] | None) -> None:
        with self.lock:
            self.busy -= 1
            self.absent += kept is None
        if kept is None:
            self.warm()
        else:
            self.free.put(kept)

    def _new(self) -> subprocess.Popen[bytes]:
        child = start_child("serve", self.config)
        line, state = exchange(child, b"", time.monotonic() + START_DEADLINE_S, limit=_REPLY_BYTES, one_line=True)
        if state != "ok":
            code = end_child(child)
            raise RuntimeError(f"sandbox child for {self.config['target']} did not start ({state}, exit code {code})")
        describe(self.config["target"], json.loads(line)["value"])
        return child

    def _ask(self, child: subprocess.Popen[bytes], arguments: Sequence[Any], deadline: float) -> ChildReply:
        request = json.dumps(arguments).encode() + b"\n"
        line, state = exchange(child, request, deadline, limit=self.reply_bytes, one_line=True)
        if state == "ok":
            reply = json.loads(line)
            return ChildReply(status=reply["status"], value=reply["value"])
        if state == "end":
            # The pipe closes a moment before the exit code of the process can be read.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1.0)
            code = end_child(child)
            if code in (-signal.SIGPROF, -signal.SIGXCPU):
                return ChildReply(status="cpu")
            return ChildReply(
                status="memory" if code in (-signal.SIGSEGV, -signal.SIGABRT) else "died", value=f"exit code {code}"
            )
        return ChildReply(status="timeout")

    def map(self, items: Sequence[tuple[Any, ...]], *, deadline_s: float = 60.0) -> list[ChildReply]:
        """``call`` on each distinct item, ``workers`` at a time. Items whose turn does not come are ``skipped``."""
        end = time.monotonic() + deadline_s
        keys: list[Hashable] = [json.dumps(item) for item in items]
        distinct = dict(zip(keys, items, strict=True))

        def reply_to(item: tuple[Any, ...]) -> ChildReply:
            left_s = end - time.monotonic()
            return self.call(*item, wait_s=left_s) if left_s > 0 else ChildReply(status="skipped")

        with ThreadPoolExecutor(self.workers) as threads:
            replies = dict(zip(distinct, threads.map(reply_to, distinct.values()), strict=True))
        return [replies[key] for key in keys]


def shared_pool(target: str, make: Callable[[], Pool]) -> Pool:
    """This process's pool for ``target``, made on first use and again after a fork."""
    with _state.lock:
        if target not in _state.pools:
            _state.pools[target] = make()
        return _state.pools[target]
