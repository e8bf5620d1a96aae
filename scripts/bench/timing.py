"""Timing that the benches share; they are run as scripts, which puts this folder on the path."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-9
STEPS_ALONE = (
    "reward@rewards.answer=random",
    f"optimizer.learning_rate={LEARNING_RATE}",
    "cold_start.steps=0",
    "evaluation.every_steps=0",
    "checkpoint.every_steps=0",
    "checkpoint.keep_best=false",
    "tracking.wandb=disabled",
    "tracking.samples_every_steps=0",
)
"""Overrides of a run whose steps are timed: nothing else happens, and the model stays where it is."""


def paired(
    sides: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float], *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every side in every round, one side after the other, after ``warm_up`` rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(warm_up + rounds):
        for name, run in sides.items():
            start = clock()
            run()
            if index >= warm_up:
                seconds[name].append(clock() - start)
    return seconds


def peak_extra_mb(run: Callable[[], Any]) -> float:
    """How far the resident size of this process rises above what it was while ``run`` runs, MB."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is no room for what follows
    before = _status_kb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run()
    return (_status_kb("VmHWM") - before) / 1e3 * 1.024


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
