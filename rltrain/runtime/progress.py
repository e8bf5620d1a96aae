"""What a person sees of a command: a line per stage with the time since the start, and on a terminal a bar below them.

Imports no torch, so that the first line comes at once. Only the rank that shows anything prints lines and bars.
"""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

BAR_COLUMNS = 10
# Read by the libraries when they are imported; what a user has set stays.
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
# Lines that the console shows without logging them; a run's log.txt gets them.
shown = logging.getLogger("rltrain.shown")
shown.propagate = False


@dataclass
class _Screen:
    """Since when time counts, which stage is on, and whether this rank shows anything."""

    start_s: float
    stage: str = "start"
    shows: bool = True


_screen = _Screen(start_s=time.monotonic())


def begin(*, shows: bool = True) -> None:
    """Count the time from now on. Ranks other than the first show nothing."""
    _screen.start_s, _screen.stage, _screen.shows = time.monotonic(), "start", shows


def clock(seconds: float) -> str:
    """``2:05`` or ``1:02:05``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def line(stage: str, text: str) -> str:
    """The time since the start, the stage, and what there is to say; further lines of the text under the first."""
    head = f"{clock(time.monotonic() - _screen.start_s):>7s}  {stage:<10s}  "
    return head + text.replace("\n", "\n" + " " * len(head))


def say(stage: str, text: str) -> None:
    """Begin a stage, or say something of it."""
    _screen.stage = stage
    if _screen.shows:
        written = line(stage, text)
        print(written, file=sys.stderr, flush=True)
        shown.info("%s", written)


class Bar:
    """So many of a total with the time that is left, redrawn in place on a terminal.

    Elsewhere a line at most every ``every_s`` seconds, and at the end.
    """

    def __init__(self, stage: str, total: int, *, done: int = 0, every_s: float = 0.0) -> None:
        self._stage, self._total, self._first, self._done = stage, total, done, done
        self._every_s = every_s
        self._start_s = self._last_s = time.monotonic()
        self._fields: Sequence[str] = ()
        self._live = self._started_live() if _screen.shows and sys.stderr.isatty() else None

    def update(self, done: int, fields: Sequence[str] = ()) -> None:
        """``fields`` are short texts, the most important first: a terminal shows those that fit."""
        _screen.stage = self._stage
        told = self._done == done >= self._total  # the last step, once
        self._done, self._fields = done, fields
        now = time.monotonic()
        if not _screen.shows or told or (now - self._last_s < self._every_s and done < self._total):
            return
        self._last_s = now
        written = line(self._stage, "  ".join([f"step {done}/{self._total}", *fields, f"ETA {clock(self.eta_s())}"]))
        shown.info("%s", written)
        if self._live is None:
            print(written, file=sys.stderr, flush=True)

    def eta_s(self) -> float:
        """The seconds that the rest takes at the mean speed so far; 0 before the first."""
        made = self._done - self._first
        return (time.monotonic() - self._start_s) / made * (self._total - self._done) if made > 0 else 0.0

    def text(self, columns: int) -> str:
        """The bar's line, within so many columns."""
        full = round(BAR_COLUMNS * self._done / max(1, self._total))
        eta = clock(self.eta_s()) if self._done > self._first else "-:--"
        kept = f"{'━' * full}{'─' * (BAR_COLUMNS - full)} {self._done}/{self._total}  ETA {eta}"
        written = line(_screen.stage, kept)
        for field in self._fields:
            if len(written) + 2 + len(field) > columns:
                break
            written += f"  {field}"
        return written[:columns]

    def close(self) -> None:
        """Take the bar away; what was printed stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _started_live(self) -> Any:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        screen = Console(stderr=True)
        live = Live(
            get_renderable=lambda: Text(self.text(screen.width - 1), no_wrap=True, overflow="crop"),
            console=screen,
            refresh_per_second=4,
            transient=True,
        )
        live.start()
        return live


class ConsoleHandler(logging.StreamHandler[TextIO]):
    """Log records as lines of the stage that is on, above the bar where there is one.

    Libraries are heard from errors on, or, ``verbose``, from warnings on.
    """

    def __init__(self, *, verbose: bool) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(message)s"))
        self._verbose = verbose
        self.addFilter(self._is_shown)

    def _is_shown(self, record: logging.LogRecord) -> bool:
        return self._verbose or record.levelno >= logging.ERROR or not is_of_library(record)

    def format(self, record: logging.LogRecord) -> str:
        return line(_screen.stage, super().format(record).removeprefix(f"{_screen.stage}: "))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr  # which a bar replaces as long as it is there
        super().emit(record)


def is_of_library(record: logging.LogRecord) -> bool:
    """Whether a record comes from an installed package or from Python itself, rather than from us or from a user."""
    if record.name.partition(".")[0] == "rltrain":
        return False
    path = record.pathname.replace(os.sep, "/")
    of_python = sysconfig.get_paths()["stdlib"].replace(os.sep, "/")
    return path.startswith((f"{of_python}/", "<")) or "/site-packages/" in path or "/dist-packages/" in path


@contextmanager
def set_up(*, verbose: bool = False) -> Iterator[None]:
    """Logs and Python's warnings go to the console, by :class:`ConsoleHandler`; as they were after the block."""
    root, ours = logging.getLogger(), logging.getLogger("rltrain")
    before = (root.handlers[:], root.level, ours.level, warnings.showwarning)
    start(verbose=verbose)
    try:
        yield
    finally:
        root.handlers[:], warnings.showwarning = before[0], before[3]
        root.setLevel(before[1])
        ours.setLevel(before[2])


def start(*, verbose: bool = False) -> None:
    """The same for the rest of the process."""
    if not verbose:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
    root = logging.getLogger()
    root.handlers[:] = [ConsoleHandler(verbose=verbose)]  # not closed, since they may come back
    root.setLevel(logging.WARNING)
    logging.getLogger("rltrain").setLevel(logging.INFO)
    warnings.showwarning = _log_warning


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as a log record of the file that gave it, so that it is heard or not like other records."""
    name, text = "py.warnings", f"{category.__name__}: {message}"
    logger = logging.getLogger(name)
    logger.handle(logging.LogRecord(name, logging.WARNING, filename, lineno, text, None, None))
