"""Words over generators of the alternating group A5: a document ``abdc=K.`` names the state that the word reaches.

The states are the 60 even permutations of five points, in lexicographic order, named by the letters and the digits 0
to 7. A word acts letter by letter from the left, from the identity: ``state <- state, then generator``. The word
problem of a group that is not solvable, as A5, is complete for NC1 (Barrington 1989), so a transformer of constant
depth is not believed to solve it in one pass at every length (arXiv 2404.08819). A thought holds the state after each
letter, a token each.

Splits. A hash of the word says which split it belongs to; a word of another split is drawn again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import permutations
from string import ascii_letters, ascii_lowercase
from typing import overload

from rltrain.data.random_calculation import MAX_REDRAWS, SPLIT_OF_QUARTER, SPLITS
from rltrain.data.text import CutConfig, Documents, uniform
from rltrain.errors import ConfigError, require
from rltrain.registry import register
from rltrain.types import Problem

Permutation = tuple[int, ...]

POINTS = 5
STATE_NAMES = ascii_letters + "01234567"
MARK = "="
_CYCLES = re.compile(r"(\([1-5](?: [1-5])*\))+")


@dataclass(kw_only=True)
class AutomatonConfig(CutConfig):
    """See :mod:`rltrain.data.automaton`. The cut is at the mark; ``meta["solution"]`` is a thought and its closing tag.

    A state of a worked thought is another one, all alike, with probability ``slip``, and the thought goes on from
    there. So it ends right with probability ``1/60 + 59/60·(1 - slip·60/59)^length``. The other thoughts are empty.
    """

    generators: list[str] = field(
        default_factory=lambda: ["(1 2 3)", "(1 2 3 4 5)", "(3 4 5)", "(1 2)(3 4)"]
    )  # in cycles of the points 1 to 5; the first is written a, the second b, and so on
    min_length: int = 6  # letters of the shortest word
    max_length: int = 10  # letters of the longest word; a length is uniform between them
    end: str = "."  # what a document ends with, after the state
    after: str = MARK  # the text that every prefix ends with
    horizon: int = 0  # target tokens; 0: all that follows data.after
    worked_share: float = 1.0  # share of the thoughts that hold the states; the others are empty
    all_worked: int = 0  # the first so many items have a worked thought without a slip
    slip: float = 0.0  # probability that a state of a worked thought is another one
    train_size: int = 100_000  # words for training
    validation_size: int = 512  # words for validation
    test_size: int = 512  # words for the test

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            1 <= self.min_length <= self.max_length,
            f"data.min_length={self.min_length}: must lie in 1..data.max_length={self.max_length}",
        )
        for key in ("slip", "worked_share"):
            require(0 <= getattr(self, key) <= 1, f"data.{key}={getattr(self, key)}: must lie in [0, 1]")
        require(self.all_worked >= 0, f"data.all_worked={self.all_worked}: must be >= 0")
        for split in SPLITS:
            require(getattr(self, f"{split}_size") >= 1, f"data.{split}_size: an empty data set; set at least 1")
        named = sorted(set(self.end) & set(STATE_NAMES))
        require(not named, f"data.end={self.end!r}: {named[0] if named else ''!r} names a state; set '.'")
        require(
            len(self.generators) <= len(ascii_lowercase),
            f"data.generators: {len(self.generators)} of them; there are letters for {len(ascii_lowercase)}",
        )
        reached = len(closure([parsed(text) for text in self.generators]))
        require(
            reached == len(STATE_NAMES),
            f"data.generators={list(self.generators)}: generate {reached} permutations; choose even ones that generate "
            "all 60, such as '(1 2 3)' and '(1 2 3 4 5)'",
        )


def parsed(cycles: str) -> Permutation:
    """``(1 2 3)(4 5)`` as the images of the points 0 to 4: ``(1, 2, 0, 4, 3)``. ConfigError for another form."""
    points = re.findall(r"[1-5]", cycles)
    require(
        _CYCLES.fullmatch(cycles) is not None and len(set(points)) == len(points),
        f"data.generators: {cycles!r} is not made of disjoint cycles of the points 1 to 5; write '(1 2)(3 4)'",
    )
    images = list(range(POINTS))
    for cycle in re.findall(r"\(([^)]*)\)", cycles):
        members = [int(point) - 1 for point in cycle.split()]
        for point, image in zip(members, members[1:] + members[:1], strict=True):
            images[point] = image
    return tuple(images)


def then(first: Permutation, second: Permutation) -> Permutation:
    """The permutation that applies ``first`` and then ``second``."""
    return tuple(second[point] for point in first)


def closure(generators: Sequence[Permutation]) -> set[Permutation]:
    """All permutations that words over the generators reach from the identity."""
    identity = tuple(range(POINTS))
    reached, waiting = {identity}, [identity]
    while waiting:
        state = waiting.pop()
        new = {then(state, generator) for generator in generators} - reached
        reached |= new
        waiting += new
    return reached


@cache
def alternating_group() -> tuple[Permutation, ...]:
    """The even permutations of five points in lexicographic order; state 0 is the identity."""

    def inversions(images: Permutation) -> int:
        return sum(images[i] > images[j] for j in range(POINTS) for i in range(j))

    return tuple(images for images in permutations(range(POINTS)) if inversions(images) % 2 == 0)


@cache
def transitions(generators: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """``[generator][state]``: the state after that generator."""
    number = {state: index for index, state in enumerate(alternating_group())}
    return tuple(tuple(number[then(state, parsed(text))] for state in alternating_group()) for text in generators)


def split_of(word: str) -> str:
    """The split that a word belongs to."""
    return SPLIT_OF_QUARTER[int(len(SPLIT_OF_QUARTER) * uniform("automaton", word))]


class Automaton(Sequence[Problem]):
    """The documents of one split, made when they are asked for."""

    def __init__(self, config: AutomatonConfig, split: str) -> None:
        require(split in SPLITS, f"split={split}: unknown; choose from {', '.join(SPLITS)}")
        self.config, self.split, self.table = config, split, transitions(tuple(config.generators))

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
        word = self._word(index)
        answer = STATE_NAMES[self._states(word)[-1]]
        return Problem(
            id=f"automaton-{self.split}-{self.config.seed}-{index}",
            prompt=f"{word}{MARK}{answer}{self.config.end}",
            answer=answer,
            meta={"solution": self._thought(word, index) + self.config.closing, "length": len(word)},
        )

    def _uniform(self, *key: object) -> float:
        return uniform(*key, self.config.seed, self.split)

    def _word(self, index: int) -> str:
        shortest, lengths = self.config.min_length, self.config.max_length - self.config.min_length + 1
        length = shortest + int(lengths * self._uniform("length", index))
        for redraw in range(MAX_REDRAWS):
            drawn = [self._uniform("letter", index, redraw, place) for place in range(length)]
            word = "".join(ascii_lowercase[int(len(self.table) * value)] for value in drawn)
            if split_of(word) == self.split:
                return word
        raise ConfigError(
            f"data.min_length={shortest}: no word of {length} letters in the {self.split} split; raise it"
        )

    def _states(self, word: str, added: Sequence[int] = ()) -> list[int]:
        """The state after each letter, moved on by ``added[i]`` in the order of states after the i-th."""
        states = [0]
        for place, letter in enumerate(word):
            moved = self.table[ascii_lowercase.index(letter)][states[-1]] + (added[place] if added else 0)
            states.append(moved % len(STATE_NAMES))
        return states[1:]

    def _thought(self, word: str, index: int) -> str:
        config = self.config
        is_clean = index < config.all_worked
        if not is_clean and self._uniform("worked", index) >= config.worked_share:
            return ""
        slip = 0.0 if is_clean else config.slip
        others = len(STATE_NAMES) - 1
        added = [
            1 + int(others * self._uniform("slipped to", index, place))
            if self._uniform("slip", index, place) < slip
            else 0
            for place in range(len(word))
        ]
        return "".join(STATE_NAMES[state] for state in self._states(word, added))


@register("data", "automaton", AutomatonConfig)
def automaton(config: AutomatonConfig, split: str) -> Documents:
    """The documents of ``split``; no word is shared between splits."""
    return Documents(Automaton(config, split), config)
