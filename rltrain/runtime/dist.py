"""Rank, world size, reductions, and deadlines on collectives. The only reader of torchrun's and SLURM's environment.

Every function is the identity when no process group exists, so mathematics can call them on a laptop and in tests.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

from rltrain.errors import ConfigError, RunError
from rltrain.runtime import watchdog
from rltrain.runtime.watchdog import DeadlineError

T = TypeVar("T")

# Slurm numbers the shells of batch scripts and of salloc from here on, where it numbers them at all.
FIRST_SPECIAL_STEP = NO_STEP = 0xFFFFFFF0
NO_DEADLINE_S = 365 * 24 * 3600.0
_collective_s = 0.0
_thread = threading.local()


def _environment_int(*names: str, default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


def rank() -> int:
    """This process's rank, 0 without a launcher."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else _environment_int("RANK", "SLURM_PROCID", default=0)


def local_rank() -> int:
    """The rank within this node, which is also the GPU to use."""
    return _environment_int("LOCAL_RANK", "SLURM_LOCALID", default=0)


def world_size() -> int:
    """The number of ranks, 1 without a launcher."""
    if torch_dist.is_initialized():
        return torch_dist.get_world_size()
    return _environment_int("WORLD_SIZE", "SLURM_NTASKS", default=1)


def is_main() -> bool:
    """True on the one rank that writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """The device that this rank computes on. Slurm may show each task its GPU alone, which is then number 0."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def device_in_words() -> str:
    """The device and what it is, for people: ``cpu (2 threads)``, ``cuda:0 NVIDIA H200``."""
    here = device()
    if here.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return f"{here} {torch.cuda.get_device_name(here)}"


def refuse_unused_gpu() -> None:
    """Raise ``ConfigError`` where the driver lists a GPU that torch cannot use, unless it is hidden on purpose."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    if gpu := _first_listed_gpu():
        build = "is a build without CUDA" if torch.version.cuda is None else "finds no driver that it can use"
        raise ConfigError(
            f"{gpu} is here, and torch {torch.__version__} {build}; make the environment again on this machine "
            "(CONTRIBUTING.md, Set up), or train on the CPU with CUDA_VISIBLE_DEVICES= before the command"
        )


def _first_listed_gpu() -> str | None:
    """The first GPU by ``nvidia-smi -L``, whose lines are ``GPU 0: NVIDIA H200 (UUID: GPU-…)``."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return listed.splitlines()[0].partition(" (UUID")[0] if listed.startswith("GPU ") else None


def _first_slurm_host() -> str:
    names = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    return subprocess.run(names, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]


def _export_launcher_variables() -> None:
    """Set the variables torch.distributed and DeepSpeed read, whichever launcher started us."""
    port = 20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000
    os.environ.setdefault("RANK", str(rank()))
    os.environ.setdefault("WORLD_SIZE", str(world_size()))
    os.environ.setdefault("LOCAL_RANK", str(local_rank()))
    if "MASTER_ADDR" not in os.environ:
        several_tasks = int(os.environ["WORLD_SIZE"]) > 1 and "SLURM_JOB_NODELIST" in os.environ
        os.environ["MASTER_ADDR"] = _first_slurm_host() if several_tasks else "127.0.0.1"
    os.environ.setdefault("MASTER_PORT", str(port))
    os.environ.setdefault("DS_ACCELERATOR", device().type)


def refuse_tasks_without_srun() -> None:
    """Refuse to wait for the tasks of a Slurm allocation where nothing has started them.

    A batch script's shell and ``salloc``'s know the number of tasks, too, but are no step that ``srun`` has started.
    """
    tasks, step = _environment_int("SLURM_NTASKS", default=1), _environment_int("SLURM_STEP_ID", default=NO_STEP)
    if tasks > 1 and step >= FIRST_SPECIAL_STEP and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"SLURM_NTASKS={tasks}: this process was not started by srun, so its {tasks - 1} peers will not come; "
            "start it with srun python -m …, submit slurm/train.sbatch, or set WORLD_SIZE=1 RANK=0 to run on one rank"
        )


def setup(*, deadline_s: float, join_s: float | None = None) -> None:
    """Join the process group (NCCL on GPUs, gloo otherwise) within ``join_s`` seconds.

    A collective then waits at most ``deadline_s``; 0 is forever. Where the watchdog is armed it comes first, because it
    says more.
    """
    global _collective_s
    _collective_s = deadline_s
    if torch_dist.is_initialized():
        return
    refuse_tasks_without_srun()
    _export_launcher_variables()
    _import_before_joining()
    _forget_left_groups()
    timeout = _library_timeout(deadline_s)
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if world_size() == 1:
        # One process needs no port: a store in memory cannot clash with a neighbour's run.
        torch_dist.init_process_group(_backend(), store=torch_dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    join_s = deadline_s if join_s is None else join_s
    named_wait("all ranks to join", lambda: _join(_library_timeout(join_s), timeout), join_s)


def _library_timeout(deadline_s: float) -> timedelta:
    later_s = watchdog.GRACE_S if watchdog.is_armed() else 0.0
    return timedelta(seconds=deadline_s + later_s if deadline_s else NO_DEADLINE_S)


def _join(join_timeout: timedelta, timeout: timedelta) -> None:
    store, rank_there, size = next(torch_dist.rendezvous("env://", timeout=join_timeout))
    torch_dist.init_process_group(_backend(), store=store, rank=rank_there, world_size=size, timeout=timeout)


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def _import_before_joining() -> None:
    """Functions here take the group of the moment of their import for a default argument, and would keep it."""
    import deepspeed.comm.torch  # noqa: F401
    import torch.distributed.nn.functional  # noqa: F401


def _forget_left_groups() -> None:
    """A group that was left, by us or by another library, stays in DeepSpeed's caches; a new one must not meet it."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None:
        deepspeed.comm.comm.cdb = None
        deepspeed.utils.groups._release_process_group_references(group=None)


def teardown() -> None:
    """Leave the process group and end its threads, one of which may abort a process that ends while it runs."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
    _forget_left_groups()
    gc.collect()  # an engine holds groups in cycles


def named_wait(name: str, wait: Callable[[], T], deadline_s: float | None = None) -> T:
    """Run a blocking collective; if it fails, say what was waited for, on which rank, and for how long."""
    with watchdog.waiting(name, _collective_s if deadline_s is None else deadline_s) as wait_here:
        try:
            return wait()
        except RuntimeError as error:
            raise _deadline_error(wait_here, error) from error


@contextmanager
def stage(name: str, deadline_s: float) -> Iterator[None]:
    """Name a part of the work and give it a deadline; if a peer is lost to a library's collective in it, say so."""
    with watchdog.waiting(name, deadline_s) as wait_here:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RunError) or not _lost_peer(error):
                raise
            raise _deadline_error(wait_here, error) from error


def _lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed, rather than the computation; gloo has no error type of its own."""
    return isinstance(error, torch_dist.DistError) or "gloo" in str(error)


def _deadline_error(wait: watchdog.Wait, error: RuntimeError) -> DeadlineError:
    cause = str(error).strip().partition("\n")[0]
    return DeadlineError(f"rank {rank()}: waited {wait.waited_s:.0f} s for '{wait.name}': {cause}")


@contextmanager
def alone() -> Iterator[None]:
    """For a thread beside the one that talks to the other ranks: its collectives are the identity."""
    _thread.alone = True
    try:
        yield
    finally:
        _thread.alone = False


def _nobody_else() -> bool:
    """Whether there are no other ranks to talk to, or this thread does not."""
    return not torch_dist.is_initialized() or torch_dist.get_world_size() == 1 or getattr(_thread, "alone", False)


def _reduce(values: Tensor, operation: torch_dist.ReduceOp.RedOpType, name: str) -> Tensor:
    if _nobody_else():
        return values
    buffer = values.to(device=device(), copy=True)
    named_wait(name, lambda: torch_dist.all_reduce(buffer, operation))
    return buffer.to(values.device)


def all_sum(values: Tensor, *, name: str) -> Tensor:
    """Sum over ranks."""
    return _reduce(values, torch_dist.ReduceOp.SUM, name)


def all_max(values: Tensor, *, name: str) -> Tensor:
    """Maximum over ranks."""
    return _reduce(values, torch_dist.ReduceOp.MAX, name)


def all_min(values: Tensor, *, name: str) -> Tensor:
    """Minimum over ranks."""
    return _reduce(values, torch_dist.ReduceOp.MIN, name)


def gather_objects(value: T, *, name: str) -> list[T]:
    """Every rank's value, in rank order, on every rank."""
    if _nobody_else():
        return [value]
    gathered: list[T] = [value] * torch_dist.get_world_size()
    named_wait(name, lambda: torch_dist.all_gather_object(gathered, value))
    return gathered


def exchange_objects(outgoing: Sequence[list[T]], *, name: str) -> list[T]:
    """What all ranks have for this one, in rank order; ``outgoing[r]`` goes to rank r, and to no other."""
    if _nobody_else():
        return list(outgoing[0])
    received: list[T] = []
    for source in range(world_size()):
        parcel: list[Any] = [None]
        sent = list(outgoing) if source == rank() else None
        named_wait(name, lambda p=parcel, s=sent, r=source: torch_dist.scatter_object_list(p, s, src=r))
        received += parcel[0]
    return received


def barrier(name: str) -> None:
    """Wait until every rank is here."""
    if not _nobody_else():
        named_wait(name, torch_dist.barrier)


def main_alone(name: str, work: Callable[[], None]) -> None:
    """Rank 0 does ``work``, and the others wait for it, however long a collective may take; its end is theirs."""
    if _nobody_else():
        work()
        return
    patient: Any = torch_dist.new_group(backend="gloo", timeout=_library_timeout(0))
    if is_main():
        work()
    named_wait(name, lambda: torch_dist.barrier(patient), 0)
    torch_dist.destroy_process_group(patient)
