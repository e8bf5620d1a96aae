"""Wordy worked solutions of small integer problems, made in code: steps said again, or detours between them."""

from __future__ import annotations

import re
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
REDUNDANCY = ("said_again", "detours")
DETOUR_OPERATORS = "+-*"
PHRASES = ("so", "ok", "yes", "well", "check", "thus", "again", "in fact")


@dataclass(kw_only=True)
class WordySolutionsConfig(CompressionConfig):
    """RandomCalculation's small integers; keys as there. ``tasks`` are taken in turn.

    compress: shorten the wordy solution; ``meta["solution"]`` keeps each redundant line with probability ``keep``.
    solve: the question alone; its solution is the wordy one and the boxed answer.

    A step is followed by a redundant line with probability ``again``, then by another with the same, ``most`` times at
    most. ``redundancy=said_again``: the step once more behind one of ``phrases``. Many phrases make the wordy lines
    hard to foresee, one makes them mere copies. ``redundancy=detours``: a calculation of two operands that occur
    neither in the problem nor in its steps (:func:`detour`).
    """

    instruction: str = "{question}\n{trace}\n"  # what the compressor is shown
    ask: str = "{question}\n"  # what the other model is shown
    before_trace: str = ""  # text before a trace
    after_trace: str = "\n"  # text behind a trace
    tasks: list[str] = field(default_factory=lambda: ["compress"])
    keep: float = 0.5
    again: float = 0.6
    most: int = 4
    redundancy: str = "said_again"  # what a redundant line is: said_again or detours
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
        require(
            self.redundancy in REDUNDANCY,
            f"data.redundancy={self.redundancy}: unknown; choose from {', '.join(REDUNDANCY)}",
        )
        self.expressions()
        self._check_detours()

    def _check_detours(self) -> None:
        """A problem of k operators has at most 2k+1 numbers; a detour needs another, and an operator it can use."""
        if self.redundancy != "detours":
            return
        least = 2 * max(self.steps) + 1
        require(
            self.max_operand >= least,
            f"data.max_operand={self.max_operand}: too few numbers for detours; set at least {least}, or "
            "data.redundancy=said_again",
        )
        require(
            bool(set(self.operators) & set(DETOUR_OPERATORS)),
            f"data.operators={self.operators!r}: detours add, subtract or multiply; add one of + - *",
        )

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


def fresh_numbers(steps: Sequence[str], most: int) -> list[int]:
    """The numbers 0..``most`` that no step holds, be it as an operand or as a result."""
    used = {int(digits) for digits in re.findall(r"\d+", "\n".join(steps))}
    return [value for value in range(most + 1) if value not in used]


def detour(fresh: Sequence[int], operators: str, *key: object) -> str:
    """A right calculation ``a+b=c``, ``a-b=c`` or ``a*b=c`` with c >= 0, of two operands drawn from ``fresh``."""
    left, right = (fresh[int(uniform(side, *key) * len(fresh))] for side in ("left", "right"))
    usable = [operator for operator in DETOUR_OPERATORS if operator in operators]
    operator = usable[int(uniform("operator", *key) * len(usable))]
    if operator == "-":
        left, right = max(left, right), min(left, right)
    result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return f"{left}{operator}{right}={result}"


def wordy_lines(steps: Sequence[str], config: WordySolutionsConfig, name: str) -> list[tuple[str, bool]]:
    """Lines and whether each is a step: while a coin of ``again`` falls well, a step gets a redundant line more."""
    lines, fresh = [], fresh_numbers(steps, config.max_operand)
    for number, step in enumerate(steps):
        lines.append((step, True))
        for time in range(config.most):
            key = (number, time, config.seed, name)
            if uniform("again", *key) >= config.again:
                break
            if config.redundancy == "detours":
                lines.append((detour(fresh, config.operators, *key), False))
            else:
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
        return trace_problem(solved, question=question, trace=trace, config=config, bare="\n".join(steps))


@register("data", "wordy_solutions", WordySolutionsConfig)
def wordy_solutions(config: WordySolutionsConfig, split: str) -> WordySolutions:
    """The tasks of ``split``; no problem is shared between splits."""
    return WordySolutions(config, split)
