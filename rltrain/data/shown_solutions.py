"""Small integer problems, some behind their own solution: a cold start for models that are to use one that is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

from rltrain.data.random_calculation import RandomCalculation, RandomCalculationConfig
from rltrain.data.text import uniform
from rltrain.errors import require
from rltrain.registry import register
from rltrain.types import Problem

PLACES = ("{prompt}", "{solution}")


@dataclass(kw_only=True)
class ShownSolutionsConfig(RandomCalculationConfig):
    """RandomCalculation's problems; keys as there. A ``shown_share`` of them have ``shown`` as their prompt."""

    preset: str = "integers"
    steps: list[int] = field(default_factory=lambda: [2, 3])  # numbers of operators, taken in turn
    prompt: str = "{expression}\n"  # of a problem
    shown: str = "{prompt}{solution}\n{prompt}"  # a prompt that shows the solution of its own problem
    shown_share: float = 0.5  # of problems, drawn by their ids, with such a prompt

    def __post_init__(self) -> None:
        super().__post_init__()
        missing = [place for place in PLACES if place not in self.shown]
        require(not missing, f"data.shown={self.shown!r}: lacks {' and '.join(missing)}; add it")
        require(0 <= self.shown_share <= 1, f"data.shown_share={self.shown_share}: must lie in [0, 1]")


class ShownSolutions(Sequence[Problem]):
    """The problems of one split, made when they are asked for."""

    def __init__(self, config: ShownSolutionsConfig, split: str) -> None:
        self._config, self._problems = config, RandomCalculation(config, split)

    def __len__(self) -> int:
        return len(self._problems)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        problem = self._problems[index]
        if uniform("shown", problem.id) >= self._config.shown_share:
            return problem
        assert isinstance(problem.prompt, str)
        text = self._config.shown.replace("{prompt}", problem.prompt).replace("{solution}", problem.meta["solution"])
        return dataclasses.replace(problem, prompt=text)


@register("data", "shown_solutions", ShownSolutionsConfig)
def shown_solutions(config: ShownSolutionsConfig, split: str) -> ShownSolutions:
    """The problems of ``split`` (train, validation or test)."""
    return ShownSolutions(config, split)
