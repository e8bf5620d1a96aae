"""Signals that ask a run to stop: it finishes the step, saves, and leaves with a code that means "start me again"."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

import torch

from rltrain.errors import RunError
from rltrain.runtime import dist

log = logging.getLogger(__name__)

EXIT_INTERRUPTED = 75


class Interrupted(SystemExit):
    """A signal ended the run after a saved step; the exit code tells a batch script to requeue."""


class RolloutLost(RunError):
    """No engine is left to sample with; raised on every rank at once. The exit code tells a batch script to requeue."""

    exit_code = EXIT_INTERRUPTED


class SignalWatch:
    """SIGINT, SIGTERM and SIGUSR1 only set a flag: the step is finished and saved first. A second SIGINT interrupts.

    ``at_once`` is for the time before the first step, when there is nothing to save.
    """

    WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, *, at_once: bool = False) -> None:
        self._at_once = at_once
        self._seen = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in self.WATCHED}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._at_once:
            log.warning("%s: stopped before the first step; the same command starts it", signal.Signals(number).name)
            raise Interrupted(EXIT_INTERRUPTED)
        if number == signal.SIGINT and self._seen == signal.SIGINT:
            raise KeyboardInterrupt
        self._seen = number
        log.warning("%s: finishing the step, then saving", signal.Signals(number).name)

    def received(self) -> str | None:
        """The signal that any rank has seen, the same answer on every rank."""
        number = int(dist.all_max(torch.tensor(self._seen), name="signals"))
        return signal.Signals(number).name if number else None
