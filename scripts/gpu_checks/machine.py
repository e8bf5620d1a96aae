"""The machine that is checked, and what a check says."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


class Skipped(Exception):
    """Why a check does not run here."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check expects and what it found."""

    expected: str
    found: str
    ok: bool


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the checks run. ``small`` is the CPU, where sizes are small and precision is fp32."""

    device: torch.device
    folder: Path

    @property
    def small(self) -> bool:
        return self.device.type == "cpu"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.float32,) if self.small else (torch.bfloat16, torch.float32)

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if not self.small:
            torch.cuda.synchronize()

    def gpu_only(self, why: str) -> None:
        """Skip the check on a CPU."""
        if self.small:
            raise Skipped(why)

    def seconds(self, run: Callable[[], Any], *, repeats: int = 3) -> float:
        """The fastest of some calls, after one that is not counted."""
        taken = []
        for _ in range(repeats + 1):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            taken.append(time.perf_counter() - start)
        return min(taken[1:])

    def peak_gib(self, run: Callable[[], Any]) -> float:
        """How far the allocated memory of the GPU rises while ``run`` runs."""
        if self.small:
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30


CHECKS: dict[str, Callable[[Machine], Finding]] = {}


def check(name: str) -> Callable[[Callable[[Machine], Finding]], Callable[[Machine], Finding]]:
    """Register a check under its name."""

    def add(function: Callable[[Machine], Finding]) -> Callable[[Machine], Finding]:
        CHECKS[name] = function
        return function

    return add


def short(dtype: torch.dtype) -> str:
    """bf16 or fp32."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def environment(machine: Machine) -> dict[str, str]:
    """That of a command, without a launcher; a CPU check hides the GPUs."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | ({"CUDA_VISIBLE_DEVICES": ""} if machine.small else {})
