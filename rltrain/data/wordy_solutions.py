"""Wordy worked solutions of small integer problems, made in code: steps said again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

from rltrain.data.random_calculation import RandomCalculation, RandomCalculationConfig
from rltrain.data.text import uniform
from rltrain.data.traces import CompressionConfig, trace_problem
from rltrain.errors import require
from rltrain.registry import register
from rltrain.types import Problem

TASKS = ("compress", "solve")
PHRASES = ("so", "ok", "yes", "well", "check", "thus", "again", "in fact")


@dataclass(kw_only=True)
class WordySolutionsConfig(CompressionConfig):
    """RandomCalculation's small integers; keys as there. ``tasks`` are taken in turn.

    compress: shorten the wordy solution; ``meta["solution"]`` keeps each line that says nothing new with probability
    ``keep``. solve: the question alone; its solution is the wordy one and the boxed answer.

    A step is said again with probability ``again``, then once more with the same, ``most`` times at most, each time
    behind one of ``phrases``. Many phrases make the wordy lines hard to foresee, one makes them mere copies.
    """

    instruction: str = "{question}\n{trace}\n"  # what the compressor is shown
    ask: str = "{question}\n"  # what the other model is shown
    before_trace: str = ""  # text before a trace
    after_trace: str = "\n"  # text behind a trace
    tasks: list[str] = field(default_factory=lambda: ["compress"])
    keep: float = 0.5
    again: float = 0.6
    most: int = 4
    phrases: list[str] = field(default_factory=lambda: list(PHRASES))
    steps: list[int] = field(default_factory=lambda: [2])  # numbers of operators, taken in turn
    max_operand: int = 20  # largest number in a problem
    operators: str = "+-*"  # the operators in use
    train_size: int = 100_000  # problems for training
    validation_size: int = 512  # problems for validation
    test_size: int = 512  # problems for the test
    seed: int = 0  # of the problems

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.tasks) and all(task in TASKS for task in self.tasks),
            f"data.tasks={list(self.tasks)}: unknown; list some of {', '.join(TASKS)}",
        )
        require(0 <= self.keep <= 1, f"data.keep={self.keep}: must lie in [0, 1]")
        require(0 <= self.again <= 1, f"data.again={self.again}: must lie in [0, 1]")
        require(bool(self.phrases), "data.phrases: is empty; list at least one")
        self.expressions()

    def expressions(self) -> RandomCalculationConfig:
        """The problems that are solved."""
        return RandomCalculationConfig(
            preset="integers",
            steps=self.steps,
            max_operand=self.max_operand,
            operators=self.operators,
            train_size=self.train_size,
            validation_size=self.validation_size,
            test_size=self.test_size,
            seed=self.seed,
            prompt="{expression}",
        )


def said_again(step: str, phrases: Sequence[str], *key: object) -> str:
    """A step once more, as ``phrase a+b=c`` or ``phrase c=a+b``."""
    phrase = phrases[int(uniform("phrase", *key) * len(phrases))]
    work, _, result = step.rpartition("=")
    return f"{phrase} {step}" if uniform("order", *key) < 0.5 else f"{phrase} {result}={work}"


def wordy_lines(steps: Sequence[str], config: WordySolutionsConfig, name: str) -> list[tuple[str, bool]]:
    """Lines and whether each says something new: while a coin of ``again`` falls well, a step is said once more."""
    lines = []
    for number, step in enumerate(steps):
        lines.append((step, True))
        for time in range(config.most):
            key = (number, time, config.seed, name)
            if uniform("again", *key) >= config.again:
                break
            lines.append((said_again(step, config.phrases, *key), False))
    return lines


class WordySolutions(Sequence[Problem]):
    """The tasks of one split, made when they are asked for."""

    def __init__(self, config: WordySolutionsConfig, split: str) -> None:
        self.config, self.problems = config, RandomCalculation(config.expressions(), split)

    def __len__(self) -> int:
        return len(self.problems)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        config, index = self.config, range(len(self))[index]
        # Not by index alone, which would give each task its own number of steps.
        task = config.tasks[index // len(config.steps) % len(config.tasks)]
        return self._task(self.problems[index], task)

    def _task(self, one: Problem, task: str) -> Problem:
        config, question = self.config, str(one.prompt)
        *steps, box = str(one.meta["solution"]).split("\n")
        lines = wordy_lines(steps, config, one.id)
        trace = "\n".join(line for line, _ in lines)
        if task == "solve":
            prompt, solution = config.ask.replace("{question}", question), f"{trace}\n{box}"
            return Problem(id=one.id, prompt=prompt, answer=one.answer, meta={**one.meta, "solution": solution})
        kept = [
            line
            for number, (line, new) in enumerate(lines)
            if new or uniform("keep", number, config.seed, one.id) < config.keep
        ]
        short = config.opening + "\n".join(kept) + config.closing
        solved = Problem(id=one.id, prompt=question, answer=one.answer, meta={**one.meta, "solution": short})
        return trace_problem(solved, question=question, trace=trace, config=config)


@register("data", "wordy_solutions", WordySolutionsConfig)
def wordy_solutions(config: WordySolutionsConfig, split: str) -> WordySolutions:
    """The tasks of ``split``; no problem is shared between splits."""
    return WordySolutions(config, split)
