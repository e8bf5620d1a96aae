r"""RandomCalculation: arithmetic that no model has seen (arXiv 2507.10532), with splits disjoint by construction.

An i-step expression has exactly i binary operators. It joins a j-step and an (i-1-j)-step expression, j uniform in
0..i-1, on random sides, by a uniform operator. Item (seed, split, steps, index) is its own random tree: any item costs
the same to reach, and there are no pools.

Splits. A hash of an expression, blind to the order of an operator's two sides and independent of the seed, says which
split it belongs to: train 1/2, validation 1/4, test 1/4. While a tree is built, a node of two or more operators, or
the root whatever its size, whose hash belongs to another split is drawn again. So no sub-expression of two or more
operators, and no whole problem, is shared between splits; single operations such as ``3+4`` inside larger problems are.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Context as DecimalContext
from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import overload

from rltrain.config import DataConfig
from rltrain.data.expressions import (
    LATEX,
    PLAIN,
    ArithmeticExpression,
    Notation,
    apply,
    join_key,
    number,
    parse,
    render,
    subexpressions,
    value_text,
    worked_steps,
)
from rltrain.data.text import uniform
from rltrain.errors import ConfigError, require
from rltrain.registry import register
from rltrain.types import Problem

SPLITS = ("train", "validation", "test")
CALLED = ("calls", "call")  # solutions of several turns
SOLUTIONS = ("steps", "answer", "checked", *CALLED)
SPLIT_OF_QUARTER = ("train", "train", "validation", "test")
MAX_STEPS = 20
MAX_REDRAWS = 512
REDRAWS_OF_SMALLER_SIDE = 8
FIFTEEN_DIGITS = DecimalContext(prec=15)
INTEGERS_ALPHABET = "0123456789+-*/()=\n\\boxed{}"
PROMPT = "Evaluate this expression step by step, then give its final value in \\boxed{}.\n{expression}"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What trees are made of: kinds of atoms (a kind is drawn first, then an atom), operators, admissible values."""

    atom_kinds: tuple[tuple[ArithmeticExpression, ...], ...]
    operator_orders: tuple[tuple[str, ...], ...]
    notation: Notation
    integers_between: tuple[int, int] | None = None

    def admits(self, value: Fraction) -> bool:
        """Whether a node may have this value."""
        if self.integers_between is None:
            return True
        low, high = self.integers_between
        return value.denominator == 1 and low <= value.numerator <= high


@cache
def paper() -> Preset:
    """Integers 0..100, unreduced fractions i/d with i 1..99 and d 2..9, squares and cubes of 2..99; + - * /."""
    whole = tuple(number(str(i), Fraction(i)) for i in range(101))
    fractions = tuple(
        number(LATEX.fraction % (i, d), Fraction(i, d)) for i, d in itertools.product(range(1, 100), range(2, 10))
    )
    squares, cubes = (tuple(number(f"{i}^{{{power}}}", Fraction(i**power)) for i in range(2, 100)) for power in (2, 3))
    return Preset(
        atom_kinds=(whole, fractions, squares, cubes),
        operator_orders=tuple(itertools.permutations("+-*/")),
        notation=LATEX,
    )


@cache
def integers(*, max_operand: int = 20, min_value: int = 0, max_value: int = 99, operators: str = "+-*") -> Preset:
    """Integers 0..``max_operand`` whose every intermediate value is an integer in ``min_value..max_value``.

    For models that read characters: expressions and solutions use ``INTEGERS_ALPHABET`` alone. Division is exact.
    """
    atoms = tuple(number(str(i), Fraction(i)) for i in range(max_operand + 1))
    return Preset(
        atom_kinds=(atoms,),
        operator_orders=tuple(itertools.permutations(operators)),
        notation=PLAIN,
        integers_between=(min_value, max_value),
    )


PRESETS: dict[str, Callable[[], Preset]] = {"paper": paper, "integers": integers}


def split_of(expression_key: int) -> str:
    """The split that an expression with this key belongs to."""
    return SPLIT_OF_QUARTER[expression_key >> 62]


class _Grower:
    """Draws the tree of one item from its own random stream."""

    def __init__(self, preset: Preset, split: str, draw: Callable[[], float]) -> None:
        self.preset, self.split, self.draw = preset, split, draw

    def grow(self, steps: int, *, is_root: bool = False) -> ArithmeticExpression:
        """A tree of ``steps`` operators that belongs to the split; ConfigError if none is found."""
        draw = self.draw
        if steps == 0:
            kinds = self.preset.atom_kinds
            kind = kinds[int(draw() * len(kinds))]
            return kind[int(draw() * len(kind))]
        larger, smaller_steps = None, 0
        for redraw in range(MAX_REDRAWS):
            # Usually another smaller side is enough, and cheap; a new larger side now and then ends dead ends.
            if larger is None or redraw % REDRAWS_OF_SMALLER_SIDE == 0:
                one_steps = int(draw() * steps)
                smaller_steps = min(one_steps, steps - 1 - one_steps)
                larger = self.grow(steps - 1 - smaller_steps)
            joined = self._join(steps, larger, self.grow(smaller_steps), any_split=steps == 1 and not is_root)
            if joined is not None:
                return joined
        raise ConfigError(
            f"data.steps={steps}: no expression of the {self.split} split found in {MAX_REDRAWS} draws;"
            " raise data.max_operand or data.max_value"
        )

    def _join(
        self, steps: int, one: ArithmeticExpression, other: ArithmeticExpression, *, any_split: bool
    ) -> ArithmeticExpression | None:
        """The two sides in random order under the first admissible of the operators in random order."""
        if self.draw() < 0.5:
            one, other = other, one
        orders = self.preset.operator_orders
        for operator in orders[int(self.draw() * len(orders))]:
            key = join_key(operator, one.key, other.key)
            if not any_split and split_of(key) != self.split:
                continue
            for left, right in ((one, other), (other, one)):
                value = apply(operator, left.value, right.value)
                if value is not None and self.preset.admits(value):
                    return ArithmeticExpression(steps, value, key, operator, "", left, right)
        return None


def expression_at(preset: Preset, *, seed: int, split: str, steps: int, index: int) -> ArithmeticExpression:
    """The tree of one item, in time that does not depend on the index."""
    key = hashlib.blake2b(f"{seed}/{split}/{steps}/{index}".encode(), digest_size=16).digest()
    draw = random.Random(int.from_bytes(key, "little")).random
    return _Grower(preset, split, draw).grow(steps, is_root=True)


def decimal_text(value: Fraction) -> str:
    """The value correctly rounded to 15 significant digits."""
    return f"{FIFTEEN_DIGITS.divide(Decimal(value.numerator), Decimal(value.denominator)):g}"


def boxed(value: Fraction, notation: Notation) -> str:
    r"""The value in ``\boxed{}``."""
    return f"\\boxed{{{value_text(value, notation)}}}"


def called_turns(expression: ArithmeticExpression, notation: Notation, style: str, call: str) -> list[str]:
    r"""The turns of a solution that leaves the arithmetic to an environment: its calls, then the box.

    ``style="calls"``: a call per operator, in order of evaluation; ``"call"``: the whole expression at once. ``call``
    has ``{expression}`` in it. A turn after an observation begins on a new line.
    """
    asked = [render(expression, notation)]
    if style == "calls":
        asked = [line.rpartition(notation.equals)[0] for line in worked_steps(expression, notation)]
    texts = [*(call.replace("{expression}", each) for each in asked), boxed(expression.value, notation)]
    return [texts[0], *(f"\n{text}" for text in texts[1:])]


def solution_text(expression: ArithmeticExpression, notation: Notation, style: str) -> str:
    r"""``style="steps"``: one line per operator, then the exact value in ``\boxed{}``; ``"answer"``: the box alone.

    ``"checked"``: between the two, the first c lines again after ``check``, c of 0..operators as the expression's key
    has it: a solution that goes on after the answer is found.
    """
    lines = [] if style == "answer" else worked_steps(expression, notation)
    if style == "checked":
        lines += [f"check {line}" for line in lines[: expression.key % (len(lines) + 1)]]
    return "\n".join([*lines, boxed(expression.value, notation)])


@dataclass(kw_only=True)
class RandomCalculationConfig(DataConfig):
    """``steps`` are taken in turn; ``{expression}`` in ``prompt`` stands for the printed expression.

    The first ``all_worked`` problems of a split have ``solution`` in ``meta``, and so has a share ``worked_share`` of
    the later ones, drawn by their ids; the others have the box alone. Solutions ``calls`` and ``call`` are lists of
    turns (:func:`called_turns`), whose observations the cold start gets from the run's environment.
    ``max_operand``, ``min_value``, ``max_value`` and ``operators`` belong to ``preset=integers`` (:func:`integers`).
    """

    preset: str = "paper"
    steps: list[int] = field(default_factory=lambda: [5])
    train_size: int = 100_000  # problems for training
    validation_size: int = 512  # problems for validation
    test_size: int = 512  # problems for the test
    seed: int = 0  # of the problems
    prompt: str = PROMPT
    solution: str = (
        "steps"  # worked solutions for cold starts: steps, answer, checked, or with an environment: calls, call
    )
    call: str = "<calc>{expression}</calc>"  # what a turn of calls or call writes to ask the environment
    worked_share: float = 1.0  # share of the problems with that solution; the others have the box alone
    all_worked: int = 0  # the first so many problems of a split all have it
    max_operand: int = 20
    min_value: int = 0
    max_value: int = 99
    operators: str = "+-*"

    def __post_init__(self) -> None:
        require(self.preset in PRESETS, f"data.preset={self.preset}: unknown; set one of {', '.join(PRESETS)}")
        require(
            bool(self.steps) and all(1 <= steps <= MAX_STEPS for steps in self.steps),
            f"data.steps={list(self.steps)}: must be numbers of operators; list some in 1..{MAX_STEPS}",
        )
        for split in SPLITS:
            size = getattr(self, f"{split}_size")
            require(size >= 1, f"data.{split}_size={size}: an empty data set; set at least 1")
        require("{expression}" in self.prompt, f"data.prompt={self.prompt!r}: lacks the problem; add {{expression}}")
        require(
            self.solution in SOLUTIONS, f"data.solution={self.solution}: unknown; set one of {', '.join(SOLUTIONS)}"
        )
        require("{expression}" in self.call, f"data.call={self.call!r}: asks for nothing; add {{expression}}")
        require(
            self.preset == "integers" or self.solution not in CALLED,
            f"data.solution={self.solution}: an environment reads no LaTeX; set data.preset=integers",
        )
        require(0 <= self.worked_share <= 1, f"data.worked_share={self.worked_share}: must lie in [0, 1]")
        require(self.all_worked >= 0, f"data.all_worked={self.all_worked}: must be >= 0")
        require(self.max_operand >= 1, f"data.max_operand={self.max_operand}: must be >= 1")
        require(
            self.min_value <= 0 <= self.max_operand <= self.max_value,
            f"data.min_value={self.min_value}, data.max_value={self.max_value}: an operand of"
            f" 0..{self.max_operand} would be inadmissible; widen them",
        )
        require(
            bool(self.operators) and set(self.operators) <= set("+-*/"),
            f"data.operators={self.operators!r}: unknown; choose from + - * /",
        )

    def size(self, split: str) -> int:
        """The number of problems of a split."""
        return int(getattr(self, f"{split}_size"))

    def build_preset(self) -> Preset:
        """The preset with this config's bounds."""
        if self.preset != "integers":
            return PRESETS[self.preset]()
        return integers(
            max_operand=self.max_operand,
            min_value=self.min_value,
            max_value=self.max_value,
            operators="".join(sorted(set(self.operators))),
        )


class RandomCalculation(Sequence[Problem]):
    """The problems of one split, made when they are asked for. Item i has ``steps[i % len(steps)]`` operators."""

    def __init__(self, config: RandomCalculationConfig, split: str) -> None:
        require(split in SPLITS, f"split={split}: unknown; choose from {', '.join(SPLITS)}")
        self.config, self.split, self.preset = config, split, config.build_preset()

    def __len__(self) -> int:
        return self.config.size(self.split)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self._problem(range(len(self))[index])

    def _problem(self, index: int) -> Problem:
        config, notation = self.config, self.preset.notation
        steps = config.steps[index % len(config.steps)]
        tree = expression_at(self.preset, seed=config.seed, split=self.split, steps=steps, index=index)
        expression = render(tree, notation)
        name = f"{config.preset}-{self.split}-{config.seed}-{steps}-{index}"
        is_worked = index < config.all_worked or uniform("worked", name) < config.worked_share
        return Problem(
            id=name,
            prompt=config.prompt.replace("{expression}", expression),
            answer=decimal_text(tree.value),
            meta={
                "expression": expression,
                "exact": f"{tree.value.numerator}/{tree.value.denominator}",
                "steps": steps,
                "solution": self._solution(tree, is_worked=is_worked),
            },
        )

    def _solution(self, tree: ArithmeticExpression, *, is_worked: bool) -> str | list[str]:
        config, notation = self.config, self.preset.notation
        if is_worked and config.solution in CALLED:
            return called_turns(tree, notation, config.solution, config.call)
        return solution_text(tree, notation, config.solution if is_worked else "answer")


@register("data", "random_calculation", RandomCalculationConfig)
def random_calculation(config: RandomCalculationConfig, split: str) -> RandomCalculation:
    """The problems of ``split`` (train, validation or test)."""
    return RandomCalculation(config, split)


def generate(steps: int, count: int, *, seed: int, split: str, preset: str = "paper") -> list[Problem]:
    r"""The first ``count`` problems of ``steps`` operators.

    ``answer`` is a decimal at 15 significant digits. ``meta``: ``expression`` (the LaTeX alone), ``exact`` ("p/q"),
    ``steps`` and ``solution`` (a worked solution that ends in the exact value, boxed).
    """
    if count == 0:
        return []
    config = RandomCalculationConfig(
        preset=preset, steps=[steps], seed=seed, train_size=count, validation_size=count, test_size=count
    )
    return list(RandomCalculation(config, split))


@dataclass(frozen=True, kw_only=True)
class Leak:
    """A test expression, printed as it stands there, that also occurs in training up to the order of sides."""

    expression: str
    train_id: str
    test_id: str


def _guarded(problem: Problem) -> Iterable[ArithmeticExpression]:
    """The sub-expressions that no two splits may share: two or more operators, or the whole problem."""
    tree = parse(problem.meta["expression"])
    return (node for node in subexpressions(tree) if node.steps >= 2 or node is tree)


def leak_check(train: Iterable[Problem], test: Iterable[Problem]) -> list[Leak]:
    """Every guarded sub-expression of a test problem that a training problem has too, read from the printed form."""
    train_ids: dict[int, str] = {}
    for problem in train:
        for node in _guarded(problem):
            train_ids.setdefault(node.key, problem.id)
    return [
        Leak(expression=render(node, LATEX), train_id=train_ids[node.key], test_id=problem.id)
        for problem in test
        for node in _guarded(problem)
        if node.key in train_ids
    ]
