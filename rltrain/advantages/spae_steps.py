"""Where the reasoning steps of a completion end: token ids in, token counts out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from rltrain.errors import ConfigError
from rltrain.rollout.probe_types import vocabulary


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Token counts: of each probed step, of the tail after them, and of the whole think block."""

    step_tokens: tuple[int, ...]
    tail_tokens: int
    think_tokens: int

    @property
    def cuts(self) -> tuple[int, ...]:
        """How many completion tokens lie up to the end of each step."""
        return tuple(accumulate(self.step_tokens))


@functools.lru_cache(maxsize=4)
def check_delimiter(tokenizer: Any, delimiter: str) -> None:
    """``ConfigError`` if no token ends in the delimiter: no completion would ever have a step."""
    if not any(text.endswith(delimiter) for text in vocabulary(tokenizer)):
        raise ConfigError(
            f"advantage.delimiter={delimiter!r}: no token of this vocabulary ends in it, so no step would ever end; "
            "set one that a token ends in, such as '\\n'"
        )


def _merged(ends: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the step ends, evenly spaced, the last one kept: neighbouring steps become one."""
    count = min(len(ends), most)
    return [ends[(j + 1) * len(ends) // count - 1] for j in range(count)]


def split_steps(texts: Sequence[str], *, delimiter: str, close: str, max_steps: int) -> Steps:
    """Steps of a completion whose tokens read ``texts``.

    A step ends at a token whose own text ends in ``delimiter``, inside the think block: before the token in which
    ``close`` begins, or anywhere if it never comes. What follows the last delimiter is the tail. More than
    ``max_steps`` steps (the paper is silent) are merged with their neighbours, so that late saturation is still seen.
    """
    characters = list(accumulate(map(len, texts)))
    closed_at = "".join(texts).find(close)
    think_tokens = len(texts) if closed_at < 0 else sum(end <= closed_at for end in characters)
    ends = [t + 1 for t in range(think_tokens) if texts[t].endswith(delimiter)]
    ends = _merged(ends, max_steps)
    return Steps(
        step_tokens=tuple(end - start for start, end in pairwise([0, *ends])),
        tail_tokens=len(texts) - (ends[-1] if ends else 0),
        think_tokens=think_tokens,
    )
