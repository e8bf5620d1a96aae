"""A lock on a run folder, so that two runs never write one folder: ``lock.json`` names who holds it.

Rank 0 refreshes its time of change. A lock is taken over, with a warning, when its process is dead and was on this
machine, when it is of this Slurm job (which was requeued), or when nobody refreshed it for ``STALE_S`` seconds.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rltrain.errors import ConfigError, RunError
from rltrain.runtime import dist

log = logging.getLogger(__name__)

FILE = "lock.json"
MOST_PIDS = 2**22  # Linux has no larger pid
REFRESH_S = 10.0
STALE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock. ``machine`` tells apart hosts of one name; ``process_start`` a process that has an old pid."""

    pid: int
    host: str
    machine: str
    process_start: str | None
    since: str
    slurm_job: str | None
    token: str

    @property
    def name(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def here() -> Holder:
    """This process as a holder."""
    return Holder(
        pid=os.getpid(),
        host=os.uname().nodename,
        machine=_machine(),
        process_start=_process_start(os.getpid()),
        since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        slurm_job=os.environ.get("SLURM_JOB_ID"),
        token=uuid.uuid4().hex,
    )


def _machine() -> str:
    """The host's name, its boot and, in a container, the namespace that its pids count in."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    known = [boot.read_text().strip(), str(namespace.readlink())] if boot.exists() and namespace.is_symlink() else []
    return " ".join([os.uname().nodename, *known])


def _process_start(pid: int) -> str | None:
    """When a process began, in ticks since the boot; None where it is over (a zombie, too) or there is no ``/proc``."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] == "Z" else words[19]


def is_alive(holder: Holder) -> bool:
    """Whether the holder's process, which was on this machine, still runs."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, whose start may be hidden
        return True
    return _process_start(holder.pid) == holder.process_start


def read(path: Path) -> Holder | None:
    """The holder that a lock names; None where there is none, or it is being written or damaged."""
    try:
        values = json.loads(path.read_text())
        holder = Holder(**{entry.name: values[entry.name] for entry in fields(Holder)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return holder if isinstance(holder.pid, int) and 0 < holder.pid <= MOST_PIDS else None


def free_because(holder: Holder | None, own: Holder, *, age_s: float) -> str | None:
    """Why a lock may be taken over; None where it may not."""
    if holder is not None and holder.machine == own.machine and not is_alive(holder):
        return "that process is dead"
    here_alive = holder is not None and holder.machine == own.machine
    if holder is not None and own.slurm_job is not None and holder.slurm_job == own.slurm_job and not here_alive:
        return f"it is of this Slurm job, {own.slurm_job}"
    return f"not refreshed for {age_s:.0f} s" if age_s > STALE_S else None


class Lock:
    """A lock that this process holds, and the thread that refreshes it."""

    def __init__(self, path: Path, own: Holder) -> None:
        self._path, self._own = path, own
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="run folder's lock", daemon=True)
        self._thread.start()

    def _refresh(self) -> None:
        while not self._released.wait(REFRESH_S):
            if self.other_holder() is None:
                try:
                    os.utime(self._path)
                except OSError as error:  # a file server that is away for a moment
                    log.debug("%s: not refreshed (%s)", self._path, error)

    def other_holder(self) -> Holder | None:
        """Who took the lock while this process stood still."""
        holder = read(self._path)
        return holder if holder is not None and holder.token != self._own.token else None

    def is_gone(self) -> bool:
        """Whether there is no lock any more."""
        try:
            self._path.stat()
        except FileNotFoundError:
            return True
        except OSError as error:  # a file server that is away for a moment
            log.debug("%s: not looked at (%s)", self._path, error)
        return False

    def release(self) -> None:
        """End the thread, and remove the file unless it is another's by now."""
        self._released.set()
        self._thread.join()
        if self.other_holder() is None:
            self._path.unlink(missing_ok=True)


_held: dict[Path, Lock] = {}


def acquire(folder: Path) -> Lock:
    """Take the folder's lock; a ``ConfigError`` names who holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    path, own = folder / FILE, here()
    writing = folder / f".{FILE}_{own.token}"
    writing.write_text(json.dumps(asdict(own), indent=1))
    try:
        while not (_create(path, writing) or _take_over(folder, path, writing, own)):
            log.debug("%s: released at this moment; taken now", path)
    finally:
        writing.unlink(missing_ok=True)
    return Lock(path, own)


def _create(path: Path, writing: Path) -> bool:
    """Write a lock where there is none; False where there is one."""
    try:
        with path.open("x") as file:
            file.write(writing.read_text())
    except FileExistsError:
        return False
    return True


def _take_over(folder: Path, path: Path, writing: Path, own: Holder) -> bool:
    """Put ``writing`` in the place of a lock that is free; False where the lock was released meanwhile.

    Ages are by the file server's clock, not by ours.
    """
    holder, now_s = read(path), writing.stat().st_mtime
    try:
        age_s = now_s - path.stat().st_mtime
    except FileNotFoundError:
        return False
    reason = free_because(holder, own, age_s=age_s)
    name = holder.name if holder else "a process that has not written its name"
    if reason is None:
        raise ConfigError(
            f"run_dir={folder}: in use by {name} (refreshed {max(0.0, age_s):.0f} s ago); end that run or set another "
            f"run_dir; a lock that nobody refreshes is free after {STALE_S:.0f} s"
        )
    log.warning("%s: the lock of %s is taken over: %s", folder, name, reason)
    writing.replace(path)
    winner = read(path)
    if winner is not None and winner.token != own.token:
        raise ConfigError(f"run_dir={folder}: in use by {winner.name}, which was faster; set another run_dir")
    return True


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder's lock in the block: rank 0 does, and what it is told holds for all ranks."""
    refusal = None
    if dist.is_main():
        try:
            _held[folder.resolve()] = acquire(folder)
        except ConfigError as error:
            refusal = str(error)
    refusal = dist.gather_objects(refusal, name="the run folder's lock")[0]
    if refusal is not None:
        raise ConfigError(refusal)
    try:
        yield
    finally:
        lock = _held.pop(folder.resolve(), None)
        if lock is not None:
            lock.release()


def refuse_if_lost(folder: Path) -> None:
    """End a run whose lock was taken over while it stood still, or is gone: before it writes beside another."""
    lock = _held.get(folder.resolve())
    other = None if lock is None else lock.other_holder()
    if other is not None:
        raise RunError(
            f"run_dir={folder}: taken over by {other.name} while this run stood still for over {STALE_S:.0f} s; "
            "this one ends, nothing of it is lost but the steps since its last checkpoint"
        )
    if lock is not None and lock.is_gone():
        raise RunError(
            f"run_dir={folder}: its {FILE} is gone: another run took the folder and ended, or it was deleted; this one "
            "ends, the same command goes on from the last checkpoint"
        )
