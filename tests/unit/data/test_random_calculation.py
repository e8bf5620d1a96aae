"""RandomCalculation against an evaluator of its own, and its splits against brute force."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import replace
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction

import pytest

from rltrain.data.random_calculation import (
    INTEGERS_ALPHABET,
    RandomCalculationConfig,
    generate,
    leak_check,
    paper,
    random_calculation,
)
from rltrain.errors import ConfigError
from rltrain.types import Problem

SPLITS = ("train", "validation", "test")
TOKEN = re.compile(r"\\frac|\\times|\\div|\d+|[-+*/^(){}]")
INFIX = {"+": (1, "+"), "-": (1, "-"), r"\times": (2, "*"), "*": (2, "*"), r"\div": (2, "/"), "/": (2, "/")}
OPERATE = {
    "+": Fraction.__add__,
    "-": Fraction.__sub__,
    "*": Fraction.__mul__,
    "/": Fraction.__truediv__,
    "^": lambda base, power: base ** int(power),
}


def to_postfix(latex: str) -> list[str | Fraction]:
    r"""Shunting-yard, left-associative; ``\frac{a}{b}`` is rewritten to (a/b) and ``a^{n}`` to a power first."""
    latex = re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"(\1/\2)", latex)
    tokens = TOKEN.findall(latex.replace("{", "").replace("}", ""))
    assert "".join(tokens) == re.sub(r"[\s{}]", "", latex)
    output: list[str | Fraction] = []
    waiting: list[str] = []
    rank = {symbol: level for symbol, (level, _) in INFIX.items()} | {"^": 3}
    for token in tokens:
        if token.isdigit():
            output.append(Fraction(int(token)))
        elif token == "(":
            waiting.append(token)
        elif token == ")":
            while waiting[-1] != "(":
                output.append(waiting.pop())
            waiting.pop()
        else:
            while waiting and waiting[-1] != "(" and rank[waiting[-1]] >= rank[token]:
                output.append(waiting.pop())
            waiting.append(token)
    return output + waiting[::-1]


def evaluate(latex: str) -> Fraction:
    stack: list[Fraction] = []
    for item in to_postfix(latex):
        if isinstance(item, Fraction):
            stack.append(item)
        else:
            right, left = stack.pop(), stack.pop()
            stack.append(OPERATE[INFIX.get(item, (3, item))[1]](left, right))
    (value,) = stack
    return value


def binary_operators(latex: str) -> int:
    return len(re.findall(r"\\times|\\div| \+ | - |(?<=[\d)])[-+*/]", latex))


def guarded_substructures(latex: str) -> set:
    """Every sub-expression of two or more operators, as nested (operator, unordered sides), from the postfix form."""
    latex = re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", lambda m: f"{int(m[1]) * 1000 + int(m[2]) + 10**9}", latex)
    latex = re.sub(r"(\d+)\^\{(\d)\}", lambda m: f"{int(m[1]) * 10 + int(m[2]) + 10**8}", latex)
    stack: list[tuple[int, object]] = []
    found = set()
    for item in to_postfix(latex):
        if isinstance(item, Fraction):
            stack.append((0, int(item)))
            continue
        (right_size, right), (left_size, left) = stack.pop(), stack.pop()
        node = (INFIX[item][1], frozenset([left, right]) if left != right else left)
        stack.append((left_size + right_size + 1, node))
        if left_size + right_size + 1 >= 2:
            found.add(node)
    return found


@pytest.mark.parametrize("preset", ["paper", "integers"])
def test_references_equal_an_independent_evaluation_of_the_printed_latex(preset):
    problems = [
        problem
        for steps, split in itertools.product([1, 2, 3, 5, 8, 12, 20], SPLITS)
        for problem in generate(steps, 50, seed=steps, split=split, preset=preset)
    ]
    assert len(problems) == 1050
    for problem in problems:
        value = evaluate(problem.meta["expression"])
        assert problem.meta["exact"] == f"{value.numerator}/{value.denominator}"
        assert binary_operators(problem.meta["expression"]) == problem.meta["steps"]
        with localcontext(prec=400, rounding=ROUND_HALF_EVEN):
            long = Decimal(value.numerator) / Decimal(value.denominator)
        with localcontext(prec=15, rounding=ROUND_HALF_EVEN):
            assert Decimal(problem.answer) == +long


@pytest.mark.parametrize("preset", ["paper", "integers"])
def test_worked_solutions_are_right_line_by_line(preset):
    for problem in generate(6, 150, seed=4, split="train", preset=preset):
        *lines, last = problem.meta["solution"].split("\n")
        assert len(lines) == 6
        exact = Fraction(problem.meta["exact"])
        assert evaluate(re.sub(r"^-", "0-", re.fullmatch(r"\\boxed\{(.+)\}", last)[1])) == exact
        for line in lines:
            operation, result = re.fullmatch(r"(.+?) ?= ?(.+)", line).groups()
            negative = re.sub(r"^-(\\frac\{\d+\}\{\d+\}|\d+(?:\^\{\d\})?)", r"(0-\1)", operation)
            negative = re.sub(r"\(-(\\frac\{\d+\}\{\d+\}|\d+)\)", r"(0-\1)", negative)
            assert evaluate(negative) == evaluate(re.sub(r"^-", "0-", result))


def test_a_known_worked_solution():
    found = next(
        problem
        for problem in generate(2, 2000, seed=0, split="train", preset="integers")
        if re.fullmatch(r"\(\d+\+\d+\)\*\d+", problem.meta["expression"])
    )
    a, b, c = map(int, re.findall(r"\d+", found.meta["expression"]))
    assert found.meta["solution"] == f"{a}+{b}={a + b}\n{a + b}*{c}={(a + b) * c}\n\\boxed{{{(a + b) * c}}}"


@pytest.mark.parametrize("preset", ["paper", "integers"])
def test_no_substructure_is_shared_between_splits(preset):
    problems = {
        split: [p for steps in (2, 3, 6) for p in generate(steps, 400, seed=9, split=split, preset=preset)]
        for split in SPLITS
    }
    structures = {
        split: set().union(*(guarded_substructures(p.meta["expression"]) for p in problems[split])) for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not structures[one] & structures[other]
        assert leak_check(problems[one], problems[other]) == []


def test_one_step_problems_are_disjoint_as_wholes_and_use_the_whole_small_space():
    config = RandomCalculationConfig(
        preset="integers", steps=[1], max_operand=9, train_size=2000, validation_size=2000, test_size=2000
    )
    seen = {split: {p.meta["expression"] for p in random_calculation(config, split)} for split in SPLITS}
    swapped = {re.sub(r"(\d+)(.)(\d+)", r"\3\2\1", expression) for expression in seen["train"]}
    assert not (seen["train"] | swapped) & (seen["test"] | seen["validation"])
    assert not seen["test"] & seen["validation"]
    # 100 sums, 100 products, 55 differences that are not negative.
    assert sum(map(len, seen.values())) == 255


def test_leak_check_finds_planted_leaks_also_with_swapped_sides():
    train = [Problem(id="a", prompt="", answer="", meta={"expression": r"(3 + 4) \times \frac{1}{2} - 5^{2}"})]

    def leaks(expression: str) -> list[str]:
        test = Problem(id="b", prompt="", answer="", meta={"expression": expression})
        return [leak.expression for leak in leak_check(train, [test])]

    assert leaks(r"7 \div (\frac{1}{2} \times (4 + 3))") == [r"\frac{1}{2} \times (4 + 3)"]
    assert leaks(r"(3 + 4) \times \frac{2}{4} - 5^{2}") == []
    assert leaks(r"8 - (3 + 4)") == []
    assert leaks(train[0].meta["expression"]) == [
        r"(3 + 4) \times \frac{1}{2}",
        r"(3 + 4) \times \frac{1}{2} - 5^{2}",
    ]
    ours = generate(3, 200, seed=1, split="train")
    planted = replace(ours[7], id="planted")
    clean = generate(3, 200, seed=1, split="test")
    assert {leak.test_id for leak in leak_check(ours, [*clean, planted])} == {"planted"}


@pytest.mark.parametrize("broken", ["3 +", "(3 + 4", "3 4", r"3 \plus 4", "", "3 + 4)"])
def test_leak_check_names_what_it_cannot_read(broken):
    with pytest.raises(ValueError, match=r"expression"):
        leak_check([Problem(id="x", prompt="", answer="", meta={"expression": broken})], [])


def test_any_item_is_reached_alone_and_depends_on_nothing_else():
    small = RandomCalculationConfig(steps=[2, 5], train_size=40, seed=3)
    large = RandomCalculationConfig(steps=[2, 5], train_size=10**9, seed=3)
    assert list(random_calculation(small, "train")) == random_calculation(large, "train")[:40]
    assert random_calculation(large, "train")[10**9 - 1] == random_calculation(large, "train")[-1]
    assert [p.meta["steps"] for p in random_calculation(small, "train")[:4]] == [2, 5, 2, 5]
    with pytest.raises(IndexError):
        random_calculation(small, "train")[40]
    assert generate(3, 5, seed=0, split="train") == generate(3, 9, seed=0, split="train")[:5]
    assert generate(3, 0, seed=0, split="train") == []
    assert generate(5, 9, seed=0, split="train") != generate(5, 9, seed=1, split="train")


def test_items_do_not_change_between_versions():
    """Pinned: a run's data is part of its identity."""
    (problem,) = generate(3, 1, seed=0, split="test")
    assert problem.id == "paper-test-0-3-0"
    assert problem.meta["expression"] == r"\frac{17}{7} \div (31^{3} - 12^{2} \div 75^{3})"
    assert problem.meta["exact"] == "796875/9775171763"


def test_atoms_and_operators_follow_the_paper():
    whole, fractions, squares, cubes = paper().atom_kinds
    assert [atom.value for atom in whole] == list(range(101))
    assert {atom.text: atom.value for atom in fractions} == {
        f"\\frac{{{i}}}{{{d}}}": Fraction(i, d) for i in range(1, 100) for d in range(2, 10)
    }
    assert [atom.value for atom in squares] == [i**2 for i in range(2, 100)]
    assert [atom.value for atom in cubes] == [i**3 for i in range(2, 100)]
    text = " ".join(p.meta["expression"] for p in generate(4, 1000, seed=2, split="train"))
    counts = Counter(re.findall(r"\\times|\\div| \+ | - ", text))
    # 4000 uniform draws: 5 standard deviations are 137.
    assert all(abs(count - 1000) < 137 for count in counts.values()) and len(counts) == 4


def test_shape_of_the_trees_is_a_uniform_cut():
    """Of 3-step trees, a third has a single operation on either side of the root: j = 1 of 0, 1, 2."""
    trees = [p.meta["expression"] for p in generate(3, 1500, seed=5, split="train", preset="paper")]
    balanced = 0
    for latex in trees:
        sizes, stack = [], []
        for item in to_postfix(re.sub(r"\^\{\d\}", "", re.sub(r"\\frac\{(\d+)\}\{\d+\}", r"\1", latex))):
            if isinstance(item, Fraction):
                stack.append(0)
            else:
                sizes.append((stack.pop(), stack.pop()))
                stack.append(sum(sizes[-1]) + 1)
        balanced += sizes[-1] == (1, 1)
    assert abs(balanced - 500) < 5 * (1500 * 2 / 9) ** 0.5


def test_integers_stay_within_bounds_and_alphabet_and_are_short():
    config = RandomCalculationConfig(
        preset="integers", steps=[2, 3], operators="+-*/", prompt="{expression}\n", train_size=600
    )
    for problem in random_calculation(config, "train"):
        text = problem.prompt + problem.meta["solution"]
        assert set(text) <= set(INTEGERS_ALPHABET)
        assert len(text) < 64
        assert problem.meta["exact"] == f"{problem.answer}/1"
        results = [int(line.split("=")[1]) for line in problem.meta["solution"].split("\n")[:-1]]
        assert all(0 <= result <= 99 for result in results)
        assert all(int(atom) <= 20 for atom in re.findall(r"\d+", problem.meta["expression"]))


def test_negative_intermediate_values_are_printed_in_parentheses_on_the_right():
    config = RandomCalculationConfig(preset="integers", steps=[3], min_value=-50, operators="-", train_size=300)
    lines = "\n".join(p.meta["solution"] for p in random_calculation(config, "train"))
    assert re.search(r"^\d+-\(-\d+\)=\d+$", lines, re.MULTILINE)
    assert "--" not in lines


def test_prompt_template_and_solution_style():
    config = RandomCalculationConfig(preset="integers", steps=[2], prompt="{expression}=", solution="answer")
    problem = random_calculation(config, "train")[0]
    assert problem.prompt == problem.meta["expression"] + "="
    assert problem.meta["solution"] == f"\\boxed{{{problem.answer}}}"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"preset": "papers"}, "data.preset=papers"),
        ({"steps": []}, "data.steps"),
        ({"steps": [0]}, "data.steps"),
        ({"steps": [21]}, "data.steps"),
        ({"train_size": 0}, "data.train_size=0"),
        ({"prompt": "solve"}, "data.prompt"),
        ({"solution": "long"}, "data.solution=long"),
        ({"worked_share": 1.5}, "data.worked_share=1.5"),
        ({"all_worked": -1}, "data.all_worked=-1"),
        ({"operators": "+%"}, "data.operators"),
        ({"call": "<calc>"}, "data.call='<calc>'"),
        ({"solution": "calls"}, "data.preset=integers"),
        ({"max_operand": 120}, "data.max_value=99"),
    ],
)
def test_impossible_configs_name_the_key(change, key):
    with pytest.raises(ConfigError, match=re.escape(key)):
        RandomCalculationConfig(**change)


def test_an_exhausted_space_is_an_error_with_the_remedy():
    # Two of the six unordered sums and products of 0 and 1 exist at most per split; subtraction alone leaves three.
    with pytest.raises(ConfigError, match=r"data.steps=1: no expression of the .* split"):
        for split in SPLITS:
            random_calculation(
                RandomCalculationConfig(preset="integers", steps=[1], max_operand=1, max_value=1, operators="-"), split
            )[0]


def test_a_checked_solution_repeats_its_first_lines_before_the_box():
    """Every count of checks from none to all occurs, and what is checked was derived."""
    config = RandomCalculationConfig(preset="integers", steps=[3], prompt="{expression}\n", solution="checked")
    checks_of = []
    for problem in random_calculation(config, "train")[:64]:
        *lines, box = problem.meta["solution"].split("\n")
        checks_of.append(len(lines) - 3)
        assert lines[3:] == [f"check {line}" for line in lines[: checks_of[-1]]]
        assert box == f"\\boxed{{{problem.answer}}}"
    assert set(checks_of) == {0, 1, 2, 3}


def test_a_share_of_the_solutions_is_worked_after_the_first_problems():
    """Which ones is a matter of the problem alone, and the problems are those of a set that is worked throughout."""
    options = {"preset": "integers", "steps": [2], "train_size": 2000}
    whole = random_calculation(RandomCalculationConfig(**options), "train")
    mixed = random_calculation(RandomCalculationConfig(**options, worked_share=0.25, all_worked=400), "train")
    worked = []
    for plain, problem in zip(whole, mixed, strict=True):
        assert (plain.id, plain.prompt, plain.answer) == (problem.id, problem.prompt, problem.answer)
        worked.append(problem.meta["solution"] == plain.meta["solution"])
        assert worked[-1] or problem.meta["solution"] == f"\\boxed{{{problem.answer}}}"
    assert all(worked[:400])
    assert 320 <= sum(worked[400:]) <= 480  # 400 expected of 1600, standard deviation 17
    assert mixed[1234] == mixed[1234:1235][0]


@pytest.mark.parametrize("style", ["calls", "call"])
def test_solutions_that_leave_the_arithmetic_to_an_environment(style):
    """Their turns by hand from the expression: (a o b) o c, or another association."""
    config = RandomCalculationConfig(preset="integers", steps=[2], solution=style, call="<{expression}>")
    plain = random_calculation(replace(config, solution="steps"), "train")
    for problem, worked in zip(random_calculation(config, "train")[:20], plain[:20], strict=True):
        *lines, box = worked.meta["solution"].split("\n")
        asked = [line.split("=")[0] for line in lines] if style == "calls" else [problem.meta["expression"]]
        first, *others = problem.meta["solution"]
        assert first == f"<{asked[0]}>"
        assert others == [*(f"\n<{one}>" for one in asked[1:]), f"\n{box}"]
    mixed = random_calculation(replace(config, worked_share=0.5, all_worked=3), "train")[:40]
    kinds = [isinstance(problem.meta["solution"], list) for problem in mixed]
    assert all(kinds[:3]) and 10 < sum(kinds) < 30
