"""Timing that the benches share; they are run as scripts, which puts this folder on the path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def paired(sides: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every side in every round, one side after the other, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds + 1):
        for name, run in sides.items():
            start = clock()
            run()
            if index:
                seconds[name].append(clock() - start)
    return seconds
