"""Rank, world size, reductions, and deadlines on collectives. The only reader of torchrun's and SLURM's environment.

Every function is the identity when no process group exists, so mathematics can call them on a laptop and in tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

from rltrain.config import RunError

T = TypeVar("T")


class DeadlineError(RunError):
    """A wait that passed its deadline; says what was waited for, on which rank, and for how long."""


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
    """The device that this rank computes on."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


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


def setup(*, deadline_s: float) -> None:
    """Join the process group (NCCL on GPUs, gloo otherwise); every collective waits at most ``deadline_s`` seconds."""
    if torch_dist.is_initialized():
        return
    _export_launcher_variables()
    _forget_left_groups()
    timeout = timedelta(seconds=deadline_s)
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        named_wait("all ranks to join", lambda: torch_dist.init_process_group("nccl", timeout=timeout))
    elif world_size() == 1:
        # One process needs no port: a file-less in-memory store cannot clash with a neighbour's run.
        torch_dist.init_process_group("gloo", store=torch_dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        named_wait("all ranks to join", lambda: torch_dist.init_process_group("gloo", timeout=timeout))


def _forget_left_groups() -> None:
    """A group that was left, by us or by another library, stays in DeepSpeed's caches; a new one must not meet it."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None:
        deepspeed.comm.comm.cdb = None
        deepspeed.utils.groups._release_process_group_references(group=None)


def teardown() -> None:
    """Leave the process group."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def named_wait(name: str, wait: Callable[[], T]) -> T:
    """Run a blocking collective; if it fails, say what was waited for, on which rank, and for how long."""
    start = time.monotonic()
    try:
        return wait()
    except RuntimeError as error:
        waited_s = time.monotonic() - start
        cause = str(error).strip().partition("\n")[0]
        raise DeadlineError(f"rank {rank()}: waited {waited_s:.0f} s for '{name}': {cause}") from error


def _reduce(values: Tensor, operation: torch_dist.ReduceOp.RedOpType, name: str) -> Tensor:
    if not torch_dist.is_initialized() or torch_dist.get_world_size() == 1:
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
    if not torch_dist.is_initialized() or torch_dist.get_world_size() == 1:
        return [value]
    gathered: list[T] = [value] * torch_dist.get_world_size()
    named_wait(name, lambda: torch_dist.all_gather_object(gathered, value))
    return gathered


def barrier(name: str) -> None:
    """Wait until every rank is here."""
    if torch_dist.is_initialized() and torch_dist.get_world_size() > 1:
        named_wait(name, torch_dist.barrier)
