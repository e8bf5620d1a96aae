r"""Forks: one token decides whether a completion is right, early or late; the other tokens are wording.

The prompt gives the digits a and b, of 0..``largest``. A completion names a method, A, B or C, which is right iff it is
number ``(a + b) mod 3``. ``lines`` lines of ``letters`` letters follow, each letter one of three that belong to its
place, then a box with the method's number. With ``decision=last`` the method comes after the lines, before the box.

Splits. A pair of digits belongs to one split, whatever its order: train 3/5, validation 1/5, test 1/5, by rank of a
hash. All items of a split are visits to its pairs, in turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement
from string import ascii_lowercase
from typing import overload

from rltrain.config import DataConfig
from rltrain.data.random_calculation import SPLITS
from rltrain.data.text import mixed, uniform
from rltrain.errors import require, require_one_of
from rltrain.registry import register
from rltrain.types import Problem

METHODS = "ABC"
DECISIONS = ("first", "last")
SPLIT_OF_FIFTH = ("train", "train", "train", "validation", "test")
ALTERNATIVES = 3


@dataclass(kw_only=True)
class ForksConfig(DataConfig):
    """See :mod:`rltrain.data.forks`.

    A solution's method is right with probability ``right``, and each wrong one with half of the rest. A letter is the
    likely one of its place with probability ``likely``. The first ``all_right`` items of a split name the right method,
    in likely letters alone, so that a cold start learns the sum first. Over the next ``ramp`` items both probabilities
    fall linearly from 1, since a sudden fall makes a model forget the sum. Over the visits to a pair the methods are a
    systematic sample: after m visits the right one was named :func:`expected` times, rounded up or down.
    """

    largest: int = 4  # largest digit of a pair
    decision: str = "first"  # where the method is named: first, or last, after the wording
    right: float = 0.4  # probability of the right method in solutions
    likely: float = 0.7  # probability of a place's likely letter
    lines: int = 3  # lines of wording
    letters: int = 4  # letters of a line
    all_right: int = 0  # the first so many items name the right method in likely letters
    ramp: int = 0  # over so many items after these the probabilities fall linearly to the stated ones
    prompt: str = "{a}+{b}\n"  # of a pair
    train_size: int = 100_000  # items for training
    validation_size: int = 512  # items for validation
    test_size: int = 512  # items for the test
    seed: int = 0  # of methods and letters

    def __post_init__(self) -> None:
        require_one_of(DECISIONS, "data.decision", self.decision)
        require(2 <= self.largest <= 9, f"data.largest={self.largest}: must lie in 2..9, for digits of every split")
        for key in ("right", "likely"):
            require(0 <= getattr(self, key) <= 1, f"data.{key}={getattr(self, key)}: must lie in [0, 1]")
        for key in ("lines", "letters", "train_size", "validation_size", "test_size"):
            require(getattr(self, key) >= 1, f"data.{key}={getattr(self, key)}: set at least 1")
        for key in ("all_right", "ramp"):
            require(getattr(self, key) >= 0, f"data.{key}={getattr(self, key)}: must be >= 0")
        require("{a}" in self.prompt and "{b}" in self.prompt, f"data.prompt={self.prompt!r}: add {{a}} and {{b}}")


@cache
def pairs_of(split: str, largest: int) -> tuple[tuple[int, int], ...]:
    """The ordered pairs of digits of a split."""
    unordered = list(combinations_with_replacement(range(largest + 1), 2))
    ranked = sorted(unordered, key=lambda pair: uniform("fork", *pair))
    ours = [pair for rank, pair in enumerate(ranked) if SPLIT_OF_FIFTH[rank % len(SPLIT_OF_FIFTH)] == split]
    return tuple(sorted({ordered for a, b in ours for ordered in ((a, b), (b, a))}))


def expected(visits: int, share: float, first: int, ramp: float) -> float:
    """``m·share + (1 - share)·(m - x)``: of m visits those at the right method, in the mean.

    The probability is 1 at the first ``first`` visits, falls linearly to ``share`` over the next ``ramp``, and stays
    there: ``x = (m - first)²/(2·ramp)`` in the fall, ``m - first - ramp/2`` after it.
    """
    after = max(0, visits - first)
    missed = after - ramp / 2 if after >= ramp else after**2 / (2 * ramp)
    return visits * share + (1 - share) * (visits - missed)


class Forks(Sequence[Problem]):
    """The items of one split, made when they are asked for."""

    def __init__(self, config: ForksConfig, split: str) -> None:
        require(split in SPLITS, f"split={split}: unknown; choose from {', '.join(SPLITS)}")
        self.config, self.split, self.pairs = config, split, pairs_of(split, config.largest)

    def __len__(self) -> int:
        return int(getattr(self.config, f"{self.split}_size"))

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        visit, place = divmod(index, len(self.pairs))
        a, b = self.pairs[place]
        right = (a + b) % len(METHODS)
        all_right = max(0, math.ceil((self.config.all_right - place) / len(self.pairs)))  # visits to this pair
        named = self._method(a, b, visit, all_right)
        return Problem(
            id=f"forks-{self.split}-{self.config.seed}-{index}",
            prompt=self.config.prompt.replace("{a}", str(a)).replace("{b}", str(b)),
            answer=str(right + 1),
            meta={"method": METHODS[right], "solution": self._solution(named, index)},
        )

    def _method(self, a: int, b: int, visit: int, all_right: int) -> int:
        offset = uniform("method", self.config.seed, a, b)
        right = (a + b) % len(METHODS)
        ramp = self.config.ramp / len(self.pairs)
        before, after = (
            math.floor(expected(m, self.config.right, all_right, ramp) + offset) for m in (visit, visit + 1)
        )
        if after > before:
            return right
        wrong_before = visit - before
        return (right + 1 + (wrong_before + int(2 * uniform("wrong", self.config.seed, a, b))) % 2) % len(METHODS)

    def _solution(self, method: int, index: int) -> str:
        wording = "".join(self._line(line, index) for line in range(self.config.lines))
        box = f"\\boxed{{{method + 1}}}"
        ordered = (METHODS[method], wording) if self.config.decision == "first" else (wording, METHODS[method])
        return "".join([*ordered, box])

    def _line(self, line: int, index: int) -> str:
        places = range(line * self.config.letters, (line + 1) * self.config.letters)
        return "".join(self._letter(place, index) for place in places) + "\n"

    def _letter(self, place: int, index: int) -> str:
        likely = 1 - (1 - self.config.likely) * mixed(index, self.config.all_right, self.config.ramp)
        drawn = uniform("letter", self.config.seed, self.split, index, place)
        chosen = 0 if drawn < likely else 1 if drawn < (1 + likely) / 2 else 2
        return ascii_lowercase[(ALTERNATIVES * place + chosen) % len(ascii_lowercase)]


@register("data", "one_decision", ForksConfig)
def one_decision(config: ForksConfig, split: str) -> Forks:
    """The items of ``split``; no pair of digits is shared between splits, in either order."""
    return Forks(config, split)
