"""Where the reasoning steps of a completion end: token ids in, token counts out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from rltrain.errors import ConfigError
from rltrain.rollout.probe_types import vocabulary
from rltrain.types import Turn


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Token counts of each probed step and of the tail after them, and where the think blocks are, (start, stop).

    Steps and tail count the ids of an environment, too, so that they add up to the completion.
    """

    step_tokens: tuple[int, ...]
    tail_tokens: int
    think_spans: tuple[tuple[int, int], ...]

    @property
    def cuts(self) -> tuple[int, ...]:
        """How many completion tokens lie up to the end of each step."""
        return tuple(accumulate(self.step_tokens))

    def think_tokens_behind(self, cut: int) -> int:
        """How many tokens of the think blocks lie behind the first ``cut`` tokens."""
        return sum(max(0, stop - max(start, cut)) for start, stop in self.think_spans)


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


def _think_tokens(texts: Sequence[str], close: str) -> int:
    """How many tokens end before ``close`` begins; all, if it does not."""
    closed_at = "".join(texts).find(close)
    return len(texts) if closed_at < 0 else sum(end <= closed_at for end in accumulate(map(len, texts)))


def split_steps(
    texts: Sequence[str], *, delimiter: str, close: str, max_steps: int, turns: Sequence[Turn] = ()
) -> Steps:
    """Steps of a completion whose tokens read ``texts``.

    A step ends at a token whose own text ends in ``delimiter``, inside the think block: before the token in which
    ``close`` begins, or anywhere if it never comes. What follows the last delimiter is the tail. More than
    ``max_steps`` steps (the paper is silent) are merged with their neighbours, so that late saturation is still seen.

    With ``turns`` each has a think block of its own, and what an environment wrote ends no step. An observation belongs
    to the step in which it came: one that ends with a turn ends behind the reply.
    """
    ends, think_spans, start = [], [], 0
    for turn in turns or (Turn(written=len(texts)),):
        stop = start + turn.written
        think_end = start + _think_tokens(texts[start:stop], close)
        own = [t + 1 for t in range(start, think_end) if texts[t].endswith(delimiter)]
        ends += [end if end < stop else stop + turn.observed for end in own]
        think_spans.append((start, think_end))
        start = stop + turn.observed
    ends = _merged(ends, max_steps)
    return Steps(
        step_tokens=tuple(end - start for start, end in pairwise([0, *ends])),
        tail_tokens=len(texts) - (ends[-1] if ends else 0),
        think_spans=tuple(think_spans),
    )
