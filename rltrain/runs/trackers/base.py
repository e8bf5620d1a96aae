"""What every tracker does: each step once, also over resumed runs, and a failure of the service is a warning."""

from __future__ import annotations

import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rltrain.config import TrackingConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker knows of a run. ``config`` is the resolved config as plain data."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    tracking: TrackingConfig


class Tracker(ABC):
    """A service beside the files. It gets the numbers of ``metrics.jsonl`` under the same names and steps.

    ``NAME_step.txt`` in the run folder holds the last step that the service has. A step that a resumed run repeats is
    not sent again: its values are the same. ``loses_on_kill``: the service may lose steps when the process is killed,
    so the file is written at a regular end only, and without it all steps are sent again.
    """

    name: ClassVar[str]
    loses_on_kill: ClassVar[bool] = False

    def __init__(self, run: TrackedRun) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        self._mark = run.folder / f"{self.name}_step.txt"
        self._last = int(self._mark.read_text()) if self._mark.exists() else -1
        self._sent: int | None = None  # the newest step that this process sent
        self._is_on = True
        with self._guarded("start"):
            self._start(run)

    def catch_up(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Send the lines of ``metrics.jsonl`` that the service lacks."""
        for line in lines:
            self.write(line["step"], {k: v for k, v in line.items() if k != "step" and v is not None})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send a step, unless the service has it."""
        if not self._is_on or step <= self._last:
            return
        with self._guarded("log"):
            self._log(step, values)
            self._last = self._sent = step
            if not self.loses_on_kill:
                self._mark.write_text(str(step))

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send the completions of a step that this process sent."""
        if self._is_on and rows and step == self._sent:
            with self._guarded("log samples"):
                self._log_samples(step, rows)

    def close(self) -> None:
        """Finish."""
        if self._is_on:
            with self._guarded("finish"):
                self._finish()
                self._mark.write_text(str(self._last))

    @contextmanager
    def _guarded(self, action: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a service raises must not end the run
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("%s could not %s (%s); the run goes on without it", self.name, action, reason)
            self._is_on = False

    @abstractmethod
    def _start(self, run: TrackedRun) -> None: ...

    @abstractmethod
    def _log(self, step: int, values: Mapping[str, float]) -> None: ...

    @abstractmethod
    def _log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...


def stable_id(folder: Path, tracker: str) -> str:
    """An id per run folder and tracker, kept in ``TRACKER_id.txt``, so that a resumed run goes on in the same run."""
    path = folder / f"{tracker}_id.txt"
    if not path.exists():
        path.write_text(os.urandom(4).hex())
    return path.read_text().strip()


# The columns of a samples file that a person reads; the lists of tokens and their numbers stay in the files.
READ = ("sample", "prompt", "completion", "answer", "finish", "reward")
READ_PREFIXES = ("reward/", "turn/reward", "turn/failure")
STATE_KEYS = "turn/state_key"


def readable(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row of samples for a table of text."""
    return {name: value for name, value in row.items() if name in READ or name.startswith(READ_PREFIXES)}


def typed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of samples for a service that wants a type per column, also in lists: without None and NaN in them.

    An observed id, which has no log-prob, gets 0: it was given. State keys are left out.
    """
    kept = {name: value for name, value in row.items() if name != STATE_KEYS}
    if "turn/observed" in row:
        kept["logprobs"] = [0.0 if math.isnan(value) else value for value in row["logprobs"]]
    return kept
