"""Turns of a completion: what the model wrote, what an environment answered, and the protocol of environments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from rltrain.types.problems import Problem

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn: ``written`` ids of the model's, its stop id included, then ``observed`` ids of the environment's.

    ``text`` is what the model wrote, as the environment read it. ``reply`` is the text of the answer, ``reward`` and
    ``called`` are those of :class:`Reply`. ``state_key`` is ``Environment.key`` of the state in which the model wrote.
    ``failure`` is "", or how the environment failed here, such as "error", "timeout", "memory" or "too_long".
    ``latency_s`` is the time that the answer took.
    """

    written: int
    observed: int = 0
    reward: float = 0.0
    state_key: str | None = None
    called: bool = False
    failure: str = ""
    latency_s: float = 0.0
    text: str = ""
    reply: str = ""

    def __post_init__(self) -> None:
        if self.written < 0 or self.observed < 0:
            raise ValueError(f"Turn: {self.written} written and {self.observed} observed ids; both are counts")
        if not math.isfinite(self.reward):
            raise ValueError(f"Turn: a reward of {self.reward}; give a finite number, 0 where there is none")


def written_mask(turns: Iterable[Turn]) -> tuple[bool, ...]:
    """Per id of the turns, whether the model wrote it."""
    return tuple(flag for turn in turns for flag in (True,) * turn.written + (False,) * turn.observed)


def among_observed(values: Sequence[T], turns: Iterable[Turn], fill: T) -> tuple[T, ...]:
    """One value per id of the turns: ``values`` are those of the written ids in order, ``fill`` stands elsewhere."""
    mask, left = written_mask(turns), iter(values)
    if sum(mask) != len(values):
        raise ValueError(f"among_observed: {len(values)} values for {sum(mask)} written ids; give one per written id")
    return tuple(next(left) if written else fill for written in mask)


def turns_before(turns: Sequence[Turn], position: int) -> tuple[Turn, ...]:
    """The turns of the first ``position`` ids. A turn that is cut has not ended: it has no reward, text or reply."""
    kept: list[Turn] = []
    for turn in turns:
        size = turn.written + turn.observed
        if position >= size:
            kept.append(turn)
        elif position > 0:
            written = min(position, turn.written)
            kept.append(Turn(written=written, observed=position - written, state_key=turn.state_key))
        position -= size
        if position <= 0:
            break
    return tuple(kept)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What an environment answers a turn with.

    ``text`` is what the model reads next. "" with ``done`` is nothing. ``state`` is the next state, of JSON's types, so
    that it can be kept with a checkpoint. ``called``: the turn asked the environment for something, as a tool call
    does. ``failure`` is as in :class:`Turn`.
    """

    text: str
    state: Any
    done: bool = False
    reward: float = 0.0
    called: bool = False
    failure: str = ""


class Environment(Protocol):
    """What answers the model's turns. ``respond`` is pure in (state, text): replaying a conversation repeats it.

    ``stop`` are strings that end a turn of the model, beside the stop ids, such as ``</calc>``. ``role`` None inserts a
    reply's text as it is. Else it is a message of this role ("tool", "user"), between the chat template's own markers
    and followed by its generation prompt. A class that derives from this has ``start`` and ``respond`` to write.
    """

    stop: Sequence[str] = ()
    role: str | None = None

    def start(self, problem: Problem) -> Any:
        """The state before the first turn, of JSON's types."""
        ...

    def respond(self, state: Any, text: str) -> Reply:
        """The answer to a turn's ``text`` alone."""
        ...

    def prepare(self) -> None:
        """Called once in a worker before its first reply, without its deadline: load here what takes long."""
        return

    def key(self, state: Any) -> str | None:
        """Equal states have equal keys. None: the environment knows no equality of states."""
        return None
