"""``log.txt``: what the console logged, of every start of a run, with the time; rank 0 only."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rltrain.errors import ConfigError, RunError
from rltrain.runs import machine
from rltrain.runtime import dist
from rltrain.runtime.progress import shown

FILE = "log.txt"


class _FileHandler(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk is told by what needs the disk; a run does not end for its log."""


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Append what is logged and shown in the block to ``folder/log.txt``, and the error that ends it."""
    if not dist.is_main():
        yield
        return
    handler = _FileHandler(folder / FILE, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    shown.setLevel(logging.INFO)
    loggers = (logging.getLogger(), shown)
    for logger in loggers:
        logger.addHandler(handler)
    started = f"python {shlex.join(sys.orig_argv[1:])} (process {os.getpid()}, {machine.in_words()})"
    shown.info("started: %s", started)
    try:
        yield
    except (ConfigError, RunError) as error:
        shown.error("error: %s", error, exc_info=error.__cause__)
        raise
    except Exception as error:
        shown.error("ended by an error", exc_info=error)
        raise
    except BaseException as error:
        shown.error("ended by %s %s", type(error).__name__, error)
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
