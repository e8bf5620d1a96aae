"""Documents of one equation each: text in which a thought can help to predict what follows the equals sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

from rltrain.data.random_calculation import RandomCalculation, RandomCalculationConfig
from rltrain.data.text import CutConfig, Documents
from rltrain.registry import register
from rltrain.types import Problem


@dataclass(kw_only=True)
class EquationsConfig(CutConfig):
    """RandomCalculation's small integers; keys as there. An ``end`` makes the length of a result part of the target."""

    steps: list[int] = field(default_factory=lambda: [2])  # numbers of operators, taken in turn
    max_operand: int = 20  # largest number in a problem
    operators: str = "+-*"  # the operators in use
    train_size: int = 100_000  # problems for training
    validation_size: int = 512  # problems for validation
    test_size: int = 512  # problems for the test
    worked_share: float = 1.0  # share of the problems with a thought; the thoughts of the others are empty
    all_worked: int = 0  # the first so many problems of a split all have one
    end: str = ""  # what a document ends with, after the result

    def expressions(self) -> RandomCalculationConfig:
        """The problems that the equations come from."""
        return RandomCalculationConfig(
            preset="integers",
            steps=self.steps,
            max_operand=self.max_operand,
            operators=self.operators,
            train_size=self.train_size,
            validation_size=self.validation_size,
            test_size=self.test_size,
            seed=self.seed,
            worked_share=self.worked_share,
            all_worked=self.all_worked,
            prompt="{expression}",
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expressions()


class Equations(Sequence[Problem]):
    """Text ``9+8*2=25``; ``meta["solution"]`` is a thought and its closing tag: the operations, one a line."""

    def __init__(self, problems: RandomCalculation, closing: str, end: str = "") -> None:
        self.problems, self.closing, self.end = problems, closing, end

    def __len__(self) -> int:
        return len(self.problems)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        one = self.problems[index]
        thought = str(one.meta["solution"]).rpartition("\n")[0]  # all but the last line, the box
        return Problem(
            id=one.id,
            prompt=f"{one.prompt}={one.answer}{self.end}",
            answer=one.answer,
            meta={"solution": thought + self.closing, "steps": one.meta["steps"]},
        )


@register("data", "equations", EquationsConfig)
def equations(config: EquationsConfig, split: str) -> Documents:
    """The documents of ``split``; no problem is shared between splits."""
    return Documents(Equations(RandomCalculation(config.expressions(), split), config.closing, config.end), config)
