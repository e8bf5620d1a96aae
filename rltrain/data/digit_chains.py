r"""Digit chains: every line of a solution is a decision that can lose the answer, and slips are in the traces.

The prompt is ``d0+d1+...+dk``, of digits below ``base``. Line i of a solution is ``(line before + d_i) mod base``, and
the box holds the last line's digit. With probability ``slip`` a line of a trace is another digit, and the lines after
it go on from there. A model that has learnt the traces is right with the probability of :func:`probability_right`, and
more of the same traces do not change that. ``tail`` repeats the last line up to so many times.

Splits. A hash of the digits says which split a problem belongs to; digits of another split are drawn again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from rltrain.config import DataConfig
from rltrain.data.random_calculation import MAX_REDRAWS, SPLIT_OF_QUARTER, SPLITS
from rltrain.data.text import mixed, uniform
from rltrain.errors import ConfigError, require
from rltrain.registry import register
from rltrain.types import Problem


@dataclass(kw_only=True)
class DigitChainsConfig(DataConfig):
    """See :mod:`rltrain.data.digit_chains`. ``meta["solution"]`` is a trace with slips, ``answer`` the right digit."""

    steps: int = 5  # additions of a problem, k
    base: int = 3  # digits are below it, and sums are taken modulo it
    slip: float = 0.15  # probability that a line of a trace is another digit
    tail: int = 0  # most repetitions of the last line; a trace has 0..tail, all equally likely
    all_right: int = 0  # the first so many problems have no slip
    ramp: int = 0  # over so many problems after these the probability of a slip rises linearly to slip
    zeros: float = 0.0  # of the first all_right problems: probability that a digit is 0 before it is drawn
    train_size: int = 100_000  # problems for training
    validation_size: int = 512  # problems for validation
    test_size: int = 512  # problems for the test
    seed: int = 0  # of problems and slips

    def __post_init__(self) -> None:
        require(2 <= self.base <= 10, f"data.base={self.base}: must lie in 2..10, for digits of one character")
        require(0 <= self.slip <= 1, f"data.slip={self.slip}: must lie in [0, 1]")
        require(0 <= self.zeros < 1, f"data.zeros={self.zeros}: must lie in [0, 1)")
        for key in ("tail", "all_right", "ramp"):
            require(getattr(self, key) >= 0, f"data.{key}={getattr(self, key)}: must be >= 0")
        for key in ("steps", "train_size", "validation_size", "test_size"):
            require(getattr(self, key) >= 1, f"data.{key}={getattr(self, key)}: set at least 1")


def split_of(digits: Sequence[int]) -> str:
    """The split that these digits belong to."""
    return SPLIT_OF_QUARTER[int(len(SPLIT_OF_QUARTER) * uniform("chain", *digits))]


def probability_right(slip: float, steps: int, base: int) -> float:
    """``1/base + (1 - 1/base)·(1 - slip·base/(base - 1))^k``: a trace ends right, slips that cancel included.

    The error of the sum walks on the digits: a slip adds each other digit with probability ``slip/(base - 1)``.
    """
    return 1 / base + (1 - 1 / base) * (1 - slip * base / (base - 1)) ** steps


def running_sums(digits: Sequence[int], added: Sequence[int], base: int) -> list[int]:
    """``s_i = (s_{i-1} + d_i + added_i) mod base`` for i = 1..k, ``s_0 = d_0``."""
    sums = [digits[0]]
    for digit, extra in zip(digits[1:], added, strict=True):
        sums.append((sums[-1] + digit + extra) % base)
    return sums[1:]


class DigitChains(Sequence[Problem]):
    """The problems of one split, made when they are asked for."""

    def __init__(self, config: DigitChainsConfig, split: str) -> None:
        require(split in SPLITS, f"split={split}: unknown; choose from {', '.join(SPLITS)}")
        self.config, self.split = config, split

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
        digits = self._digits(index)
        return Problem(
            id=f"digit-chains-{self.split}-{self.config.seed}-{self.config.steps}-{index}",
            prompt="+".join(map(str, digits)) + "\n",
            answer=str(sum(digits) % self.config.base),
            meta={"solution": self._trace(digits, index)},
        )

    def _uniform(self, *key: object) -> float:
        return uniform(*key, self.config.seed, self.split, self.config.steps)

    def _digits(self, index: int) -> list[int]:
        for redraw in range(MAX_REDRAWS):
            drawn = [self._uniform("digit", index, redraw, place) for place in range(self.config.steps + 1)]
            if index < self.config.all_right:
                drawn = [max(0.0, value - self.config.zeros) / (1 - self.config.zeros) for value in drawn]
            digits = [int(self.config.base * value) for value in drawn]
            if split_of(digits) == self.split:
                return digits
        raise ConfigError(f"data.steps={self.config.steps}: no problem of the {self.split} split found; raise it")

    def _trace(self, digits: Sequence[int], index: int) -> str:
        config = self.config
        slip = config.slip * mixed(index, config.all_right, config.ramp)
        slips = [self._uniform("slip", index, place) < slip for place in range(config.steps)]
        added = [
            1 + int((config.base - 1) * self._uniform("slipped to", index, place)) if slips[place] else 0
            for place in range(config.steps)
        ]
        sums = running_sums(digits, added, config.base)
        sums += sums[-1:] * int((config.tail + 1) * self._uniform("tail", index))
        return "\n".join([*map(str, sums), f"\\boxed{{{sums[-1]}}}"])


@register("data", "digit_chains", DigitChainsConfig)
def digit_chains(config: DigitChainsConfig, split: str) -> DigitChains:
    """The problems of ``split``; no problem is shared between splits."""
    return DigitChains(config, split)
