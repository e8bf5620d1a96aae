"""Rewards that fail: their traceback once, and the end of a run where one fails on all of the first step."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rltrain.errors import RunError
from rltrain.runtime import dist

log = logging.getLogger(__name__)

PACKAGE = str(Path(__file__).parent.parent)
_shown: set[str] = set()
_broken: dict[str, str] = {}  # by reward, why its last call failed


class RewardError(RunError):
    """A reward that can give no score; the message names it, the cause and the remedy."""


def show_once(name: str, error: BaseException) -> None:
    """Log the traceback of what a reward raised, without our own frames; the same one is logged once per process."""
    text = "".join(traceback.format_exception(type(error), error, _users_frames(error.__traceback__)))
    if f"{name}: {text}" not in _shown:
        _shown.add(f"{name}: {text}")
        log.warning("reward %s raised:\n%s", name, text.rstrip())


def _users_frames(frames: TracebackType | None) -> TracebackType | None:
    """From the first frame on that is not of this package, or else the last."""
    while frames is not None and frames.tb_next and frames.tb_frame.f_code.co_filename.startswith(PACKAGE):
        frames = frames.tb_next
    return frames


def note(name: str, cause: str) -> None:
    """Remember how a reward's last call ended; no ``cause`` is a success, or a failure that may pass by itself."""
    _broken[name] = cause


@contextmanager
def set_aside() -> Iterator[None]:
    """What is noted in the block is forgotten after it: calls that are no part of the run's own batches."""
    before = dict(_broken)
    try:
        yield
    finally:
        _broken.clear()
        _broken.update(before)


def refuse_broken(names: Iterable[str]) -> None:
    """``RewardError`` on every rank for a reward whose last call raised, or returned no scores, on every rank.

    All ranks call this together, after the first batch of a run: a reward that fails there from end to end is wrong,
    where one that fails later may have lost its server.
    """
    here = {name: _broken.get(name, "") for name in names}
    everywhere = dist.gather_objects(here, name="rewards of the first batch")
    for name in here:
        causes = [of_rank[name] for of_rank in everywhere]
        if all(causes):
            raise RewardError(
                f"reward {name}: failed on every completion of the first step ({causes[0]}); mend the function, or "
                "leave the reward out"
            )
