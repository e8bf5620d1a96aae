"""Runs of several ranks that start in a fraction of a second: this process imports everything once and forks them.

A forked rank is what torchrun starts (RANK, WORLD_SIZE, gloo on loopback), without the seconds that imports take.
OMP_NUM_THREADS=1 is needed: threads do not survive a fork.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# What a run imports where it needs it; here once for all of them.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
import matplotlib.pyplot
import transformers.models.qwen3.modeling_qwen3

from rltrain import cli
from rltrain.config import RunConfig
from rltrain.policy.load import load_policy, save_policy

PRELOADED = (deepspeed, matplotlib.pyplot, transformers.models.qwen3.modeling_qwen3)

# A policy of 5,000 weights; ZeRO 3 would leave weights as small as these whole on every rank.
TINY = (
    "model.hidden_size=16",
    "model.layers=1",
    "model.heads=2",
    "model.intermediate_size=32",
    "data=small_integers",
    "sampling.max_new_tokens=5",
    "sampling.max_prompt_tokens=32",
    "batch.prompts_per_step=4",
    "batch.group_size=4",
    "batch.token_budget=100",
    "evaluation.every_steps=0",
    "tracking.wandb=disabled",
    "tracking.samples_every_steps=0",
)
SHARD_ALL = tuple(
    f"+deepspeed.extra.zero_optimization.stage3_{kind}_persistence_threshold=0" for kind in ("param", "model")
)


def config(folder: Path, stage: int, *overrides: str) -> RunConfig:
    """The tiny run at a ZeRO stage."""
    sharded = SHARD_ALL if stage == 3 else ()
    return cli.compose([*TINY, f"run_dir={folder}", f"deepspeed.zero_stage={stage}", *sharded, *overrides])


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def warm_up() -> None:
    """Load and save a policy here once, for what libraries prepare at their first call (half a second of regexps)."""
    with tempfile.TemporaryDirectory() as folder:
        save_policy(load_policy(config(Path(folder), 0, "reward@rewards.answer=random").model), Path(folder))


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a run."""

    pids: list[int]

    def kill(self, ranks: list[int]) -> None:
        """SIGKILL some of them."""
        for rank in ranks:
            os.kill(self.pids[rank], signal.SIGKILL)

    def wait(self) -> list[int]:
        """Exit codes in rank order; -9 for a killed one."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]

    def running(self) -> bool:
        """Whether none has ended; an ended one stays to be waited for."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return all(os.waitid(os.P_PID, pid, flags) is None for pid in self.pids)


def start(work: Callable[[], None], world_size: int, *, log: Path) -> Ranks:
    """Fork ``world_size`` processes that do ``work`` as the ranks of one group; output is appended to ``log``."""
    port = free_port()
    return Ranks(pids=[_fork(work, rank, world_size, port, log) for rank in range(world_size)])


def _fork(work: Callable[[], None], rank: int, world_size: int, port: int, log: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        cli.setup_logging()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with cli.errors_in_one_line():
            work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
