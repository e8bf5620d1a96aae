"""Every wait has a deadline and a name. A thread ends a process that waits too long, and says what it waited for.

    with waiting("rollout of step 3", 1800): ...

Waits nest; marking one costs a microsecond. Only the command line arms the thread (:func:`armed`), so a library call or
a notebook is never killed. When a deadline has passed, the process prints the wait, its place and every thread's stack,
writes a crash record, saves what :func:`rescues` registered, and exits with ``EXIT_DEADLINE``.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rltrain.errors import RunError, require

EXIT_DEADLINE = 124  # what timeout(1) says
POLL_S = 0.5
GRACE_S = 10.0
STDERR = 2  # the descriptor, whatever sys.stderr has become


@dataclass(kw_only=True)
class WatchdogConfig:
    """Deadlines of the parts of a run, in seconds; null takes ``deadline_s``, 0 sets none.

    ``join_s`` is for the ranks to find each other, ``train_s`` for one micro-batch or one optimiser step. Keep the
    others at ``collective_s`` or below: ranks that are done wait for the slowest in a collective, and the one that
    hangs should be the first to say so.
    """

    join_s: float | None = None
    collective_s: float | None = None
    rollout_s: float | None = None  # sampling of a step
    reward_s: float | None = None  # rewards of a step
    train_s: float | None = None
    evaluation_s: float | None = 7200.0  # one evaluation
    save_s: float | None = None  # one checkpoint

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            require(value is None or value >= 0, f"watchdog.{key}={value}: must be >= 0; 0 sets no deadline")


class DeadlineError(RunError):
    """A wait that passed its deadline, or whose other end is gone; says what, on which rank, and for how long."""

    exit_code = EXIT_DEADLINE


@dataclass(kw_only=True, eq=False)
class Wait:
    """A wait that is under way; ``deadline_s=0`` only names what happens inside another."""

    name: str
    deadline_s: float
    start_s: float
    thread: int

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self.start_s

    @property
    def left_s(self) -> float:
        return self.deadline_s - self.waited_s if self.deadline_s else float("inf")


# Outermost first. Appended to and removed from by any thread; the watching thread takes a copy.
_open: list[Wait] = []
_rescues: list[Callable[[], object]] = []
_armed: list[Watchdog] = []


@contextmanager
def waiting(name: str, deadline_s: float = 0.0) -> Iterator[Wait]:
    """Name what the block waits for, and give it ``deadline_s`` seconds; 0 gives it none of its own."""
    wait = Wait(name=name, deadline_s=deadline_s, start_s=time.monotonic(), thread=threading.get_ident())
    _open.append(wait)
    try:
        yield wait
    finally:
        _open.remove(wait)


def extend(seconds: float) -> None:
    """Give every open wait of this thread that has a deadline so many seconds more, for work it did not reckon with."""
    for wait in _open:
        if wait.deadline_s and wait.thread == threading.get_ident():
            wait.deadline_s += seconds


@contextmanager
def rescues(save: Callable[[], object]) -> Iterator[None]:
    """Call ``save`` if a deadline passes inside the block: in another thread, and without talking to other ranks."""
    _rescues.append(save)
    try:
        yield
    finally:
        _rescues.remove(save)


@contextmanager
def armed(folder: Path, *, rank: int) -> Iterator[None]:
    """Watch this process's waits; crash records go to ``folder``. A :class:`DeadlineError` leaves one, too."""
    watchdog = Watchdog(folder, rank)
    _armed.append(watchdog)
    watchdog.thread.start()
    try:
        yield
    except DeadlineError as error:
        watchdog.rescue(str(error), _open)
        raise
    finally:
        watchdog.stop()
        _armed.remove(watchdog)


def is_armed() -> bool:
    """Whether waits are watched in this process."""
    return bool(_armed)


class Watchdog:
    """The watching thread, and what it does when a deadline has passed."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def stop(self) -> None:
        self._stopped.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_S):
            waits = list(_open)
            nearest = min(waits, key=lambda wait: wait.left_s, default=None)
            if nearest is None or not nearest.deadline_s:
                faulthandler.cancel_dump_traceback_later()
            elif nearest.left_s <= 0:
                self._expire(nearest, waits)
            else:
                # C code that holds the interpreter's lock also holds this thread; faulthandler's needs no lock.
                margin_s = min(GRACE_S, nearest.deadline_s) + POLL_S
                faulthandler.dump_traceback_later(nearest.left_s + margin_s, exit=True, file=STDERR)

    def _expire(self, wait: Wait, waits: list[Wait]) -> None:
        """Each line may itself hang (a full pipe, a dead file system), so the end is certain before the first."""
        last_resort = threading.Timer(GRACE_S, os._exit, [EXIT_DEADLINE])
        last_resort.daemon = True
        last_resort.start()
        message = f"rank {self._rank}: {describe(wait, waits)}"
        print(f"error: {message}", file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        self.rescue(message, waits)
        os._exit(EXIT_DEADLINE)

    def rescue(self, message: str, waits: list[Wait]) -> None:
        """Write the crash record, then save whatever can be saved; a failure to is printed."""
        for save in (lambda: self._record(message, waits), *_rescues):
            try:
                saved = save()
            except Exception as error:  # the process is about to end: what else can be saved matters more
                saved = f"nothing ({type(error).__name__}: {error})"
            print(f"rank {self._rank}: saved {saved}", file=sys.__stderr__, flush=True)

    def _record(self, message: str, waits: list[Wait]) -> Path:
        """``crashes/TIME_rankR.json``: the message, the open waits from the outermost, and every thread's stack."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = {names.get(i, str(i)): traceback.format_stack(frame) for i, frame in sys._current_frames().items()}
        record = {
            "message": message,
            "rank": self._rank,
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "waits": [
                {"name": wait.name, "waited_s": round(wait.waited_s, 3), "deadline_s": wait.deadline_s}
                for wait in waits
            ],
            "stacks": stacks,
        }
        path = self._folder / "crashes" / f"{time.strftime('%Y%m%dT%H%M%S')}_rank{self._rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1))
        return path


def describe(wait: Wait, waits: list[Wait]) -> str:
    """``waited 3 s for 'A' (deadline 3 s), inside 'B', at 'C'``: what A was part of, and what was going on in it."""
    index = waits.index(wait)
    outer = "".join(f", inside '{one.name}'" for one in reversed(waits[:index]))
    inner = "".join(f", at '{one.name}'" for one in waits[index + 1 :])
    return f"waited {wait.waited_s:.0f} s for '{wait.name}' (deadline {wait.deadline_s:g} s){outer}{inner}"
