r"""The comparison ladder: the same text, number, structure or expression; what is left goes to the CAS.

``compare(gold, answer)`` takes cleaned strings and is pure, bounded and fast. Rungs, cheapest first: normalised
string; exact rational; decimal to six places; structure (tuple, set, interval, union, matrix, percent, unit,
assignment, equation, clock time, text); expression by evaluation. ``Outcome.UNKNOWN`` asks for the CAS.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence

from rltrain.rewards.verifier.evaluate import TooLarge, constant_ratio, rational, same_expression
from rltrain.rewards.verifier.expression import Expression, Unparsed, parse_expression
from rltrain.rewards.verifier.number import Number, parse_number, same_number
from rltrain.rewards.verifier.structure import (
    Equation,
    Items,
    Matrix,
    Pair,
    Relation,
    Structure,
    Text,
    Union,
    parse_structure,
)
from rltrain.rewards.verifier.unit import Quantity

MAX_ITEMS = 32
MAX_OPERATORS_FOR_NUMBER = 1  # 2^3 for 8 is tolerated; a longer sum is the question, not its answer

_SPACE = re.compile(r"(?<![a-zA-Z0-9.,])\s+|\s+(?![a-zA-Z0-9.,])")
_INFINITY = re.compile(r"([+-]?)\s*(?:\\infty|inf|infinity|oo)", re.IGNORECASE)
_LABEL = re.compile(r"(?:[a-zA-Z]|\\[a-zA-Z]+|\|)[^=+*/<>]{0,48}|\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\)")
_SET_ALGEBRA = re.compile(r"\\(?:setminus|backslash|cap|mathbb)(?![a-zA-Z])")
_FUNCTION_OF_X = re.compile(r"[a-z]\(x\)")


class Outcome(enum.Enum):
    """RIGHT and WRONG are final; the others say what could not be told, and why."""

    RIGHT = "same"
    WRONG = "different"
    UNKNOWN = "cannot be told by evaluation"
    UNPARSED_GOLD = "the gold cannot be parsed"
    UNPARSED_ANSWER = "the answer cannot be parsed"


def same_text(gold: str, answer: str) -> bool:
    """Equal but for spaces that do not separate letters or digits: ``1 2`` is not ``12``."""
    return _SPACE.sub("", gold) == _SPACE.sub("", answer)


def compare(gold: str, answer: str, *, inequalities: bool = False) -> Outcome:
    """Is ``answer`` right for ``gold``? ``inequalities``: ``x >= 0`` may stand for the interval ``[0, oo)``."""
    if same_text(gold, answer):
        return Outcome.RIGHT
    numbers = parse_number(gold), parse_number(answer)
    if numbers[0] and numbers[1]:
        return _of(same_number(numbers[0], numbers[1]))
    expected = parse_structure(gold)
    grouped = not (isinstance(expected, Items) and numbers[1])
    found = parse_structure(answer, grouped=grouped)
    if inequalities:
        expected, found = _as_interval(expected), _as_interval(found)
    return _structures(expected, found)


def compare_joined(gold: str, answers: Sequence[str]) -> Outcome:
    """Several joined boxes: the items of a gold set or list; for any other gold each of them must be right."""
    expected = parse_structure(gold)
    if isinstance(expected, Items) and not expected.ordered:
        return _structures(expected, Items("", tuple(parse_structure(answer) for answer in answers)))
    return _all([compare(gold, answer) for answer in answers])


def _of(same: bool) -> Outcome:
    return Outcome.RIGHT if same else Outcome.WRONG


def _all(outcomes: Sequence[Outcome]) -> Outcome:
    """WRONG if any is; else the first that is not RIGHT."""
    if Outcome.WRONG in outcomes:
        return Outcome.WRONG
    return next((outcome for outcome in outcomes if outcome is not Outcome.RIGHT), Outcome.RIGHT)


def _structures(gold: Structure, answer: Structure) -> Outcome:
    if isinstance(gold, Equation) or isinstance(answer, Equation):
        return _equations(gold, answer)
    if isinstance(gold, Items) and isinstance(answer, Items):
        return _items(gold, answer)
    if isinstance(gold, Text) or isinstance(answer, Text):
        return _texts(gold, answer)
    if isinstance(gold, Quantity) and isinstance(answer, Quantity):
        return _quantities(gold, answer)
    if isinstance(gold, Union) and isinstance(answer, Union):
        return _matched(gold.parts, answer.parts)
    if isinstance(gold, Matrix) and isinstance(answer, Matrix):
        return _matrices(gold, answer)
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _relations(gold, answer)
    if isinstance(gold, Pair) and isinstance(answer, Pair):
        same_half = not (gold.half and answer.half) or gold.half == answer.half
        return _of(gold.numbers == answer.numbers and same_half)
    sets = any(isinstance(one, Quantity) and _SET_ALGEBRA.search(one.text) for one in (gold, answer))
    return Outcome.UNKNOWN if sets else Outcome.WRONG


def _items(gold: Items, answer: Items) -> Outcome:
    if gold.ordered != answer.ordered and (gold.brackets or "()") != (answer.brackets or "()"):
        return Outcome.WRONG  # a bare list may stand for a tuple, in the same order
    if gold.ordered or answer.ordered:
        if gold.ordered and answer.ordered and gold.brackets != answer.brackets:
            return Outcome.WRONG
        if len(gold.items) != len(answer.items):
            return Outcome.WRONG
        return _all([_structures(a, b) for a, b in zip(gold.items, answer.items, strict=True)])
    if "" in (gold.brackets, answer.brackets) and len(gold.items) != len(answer.items):
        return Outcome.WRONG
    labels = {label for item in answer.items if (label := _label_of(item))}
    if len(labels) > 1 and not any(_label_of(item) for item in gold.items):
        return Outcome.WRONG
    return _matched(gold.items, answer.items)


def _matched(gold: Sequence[Structure], answer: Sequence[Structure]) -> Outcome:
    """The same set: every gold item has its answer and every answer its gold item."""
    if max(len(gold), len(answer)) > MAX_ITEMS:
        return Outcome.WRONG
    table = [[_structures(a, b) for b in answer] for a in gold]
    lines = table + [list(column) for column in zip(*table, strict=True)]
    outcomes = [Outcome.RIGHT if Outcome.RIGHT in line else _unmatched(line) for line in lines]
    return _all(outcomes)


def _unmatched(line: Sequence[Outcome]) -> Outcome:
    return next((outcome for outcome in line if outcome is not Outcome.WRONG), Outcome.WRONG)


def _texts(gold: Structure, answer: Structure) -> Outcome:
    words = [_plain_words(structure) for structure in (gold, answer)]
    if words[0] is not None and words[0] == words[1]:
        return Outcome.RIGHT
    short = [word is not None and word.isalpha() and len(word) <= 3 for word in words]
    if all(short) and isinstance(gold, Text) and isinstance(answer, Text):
        return _expressions(gold.words, answer.words)
    return Outcome.WRONG


def _plain_words(structure: Structure) -> str | None:
    if isinstance(structure, Text):
        return structure.words
    if isinstance(structure, Quantity) and structure.text.isalpha() and not structure.unit:
        return structure.text.casefold()
    return None


def _matrices(gold: Matrix, answer: Matrix) -> Outcome:
    shapes = [[len(row) for row in matrix.rows] for matrix in (gold, answer)]
    if shapes[0] != shapes[1] or gold.determinant != answer.determinant or sum(shapes[0]) > 4 * MAX_ITEMS:
        return Outcome.WRONG
    pairs = [
        _structures(a, b)
        for gold_row, answer_row in zip(gold.rows, answer.rows, strict=True)
        for a, b in zip(gold_row, answer_row, strict=True)
    ]
    return _all(pairs)


def _relations(gold: Relation, answer: Relation) -> Outcome:
    if len(gold.sides) != len(answer.sides):
        return Outcome.WRONG
    if len(gold.sides) > 2:
        pairs = [_expressions(a, b) for a, b in zip(gold.sides, answer.sides, strict=True)]
        return _all(pairs) if gold.operators == answer.operators else Outcome.WRONG
    try:
        sides = [[parse_expression(side) for side in relation.sides] for relation in (gold, answer)]
    except Unparsed:
        return Outcome.UNKNOWN
    ratio = constant_ratio(*sides)
    operator, other = gold.operators[0], answer.operators[0]
    if ratio is None or ratio.imag:
        return Outcome.WRONG
    if operator == r"\ne":
        return _of(other == operator)
    return _of(other == (operator if ratio > 0 else {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}[operator]))


def _as_interval(structure: Structure) -> Structure:
    """``a < x <= b`` as ``(a, b]``; a list of inequalities as a union; anything else unchanged."""
    if isinstance(structure, Items) and not structure.ordered:
        parts = tuple(_as_interval(item) for item in structure.items)
        return Union(parts) if all(isinstance(part, Items) for part in parts) else structure
    if not isinstance(structure, Relation) or r"\ne" in structure.operators:
        return structure
    sides, operators = structure.sides, structure.operators
    opening, closing = ("(" if operators[0] == "<" else "["), (")" if operators[-1] == "<" else "]")
    if len(sides) == 3 and sides[1].isalpha():
        return Items(opening + closing, (Quantity(sides[0]), Quantity(sides[2])))
    if len(sides) == 2 and sides[1].isalpha():
        return Items(f"{opening})", (Quantity(sides[0]), Quantity(r"\infty")))
    if len(sides) == 2 and sides[0].isalpha():
        return Items(f"({closing}", (Quantity(r"-\infty"), Quantity(sides[1])))
    return structure


def _label(text: str) -> str | None:
    """The name on the left of an assignment, or None if ``text`` is a value or a condition."""
    plain = re.sub(r"\\text\s*\{([^{}]*)\}|\s+", r"\1", text)
    return plain if _LABEL.fullmatch(text) and not _constant(text) else None


def _constant(text: str) -> bool:
    try:
        return not parse_expression(text).symbols
    except Unparsed:
        return False


def _label_of(structure: Structure) -> str | None:
    return _label(structure.sides[0]) if isinstance(structure, Equation) else None


def _equations(gold: Structure, answer: Structure) -> Outcome:
    if isinstance(gold, Equation) and isinstance(answer, Equation):
        return _two_equations(gold, answer)
    if isinstance(gold, Equation):
        value = _value_sides(gold)
        return _structures(parse_structure(value[-1]), answer) if value else Outcome.WRONG
    assert isinstance(answer, Equation)
    values = _value_sides(answer)
    if not values:
        return Outcome.WRONG
    last = _structures(gold, parse_structure(values[-1]))
    return _all([last, *(_value_equal(gold, side) for side in values[:-1])])


def _value_sides(equation: Equation) -> tuple[str, ...]:
    """The sides that state the value: ``x = 10/2 = 5`` gives ``10/2`` and ``5``; a condition gives none."""
    if _label(equation.sides[0]):
        return equation.sides[1:]
    if len(equation.sides) == 2 and _label(equation.sides[1]):
        return equation.sides[:1]
    return equation.sides if all(_constant(side) for side in equation.sides) else ()


def _value_equal(gold: Structure, side: str) -> Outcome:
    if isinstance(gold, Quantity):
        return _expressions(gold.text, parse_quantity_text(side))
    return _structures(gold, parse_structure(side))


def parse_quantity_text(side: str) -> str:
    """The expression of a side without its unit."""
    structure = parse_structure(side)
    return structure.text if isinstance(structure, Quantity) else side


def _two_equations(gold: Equation, answer: Equation) -> Outcome:
    labels = _label(gold.sides[0]), _label(answer.sides[0])
    if labels[0] and labels[1] and _same_label(labels[0], labels[1]):
        return _structures(parse_structure(gold.sides[-1]), parse_structure(answer.sides[-1]))
    if len(gold.sides) != 2 or len(answer.sides) != 2 or (labels[0] and _constant(gold.sides[1]) and not labels[1]):
        swapped = len(answer.sides) == 2 and labels[0] and labels[0] == _label(answer.sides[1])
        return _expressions(gold.sides[1], answer.sides[0]) if swapped else Outcome.WRONG
    try:
        sides = [parse_expression(side) for side in (*gold.sides, *answer.sides)]
    except Unparsed:
        return Outcome.UNKNOWN
    return _of(constant_ratio(sides[:2], sides[2:]) is not None)


def _same_label(a: str, b: str) -> bool:
    return a == b or ("y" in (a, b) and any(_FUNCTION_OF_X.fullmatch(label) for label in (a, b)))


def _quantities(gold: Quantity, answer: Quantity) -> Outcome:
    percents = gold.unit == "%", answer.unit == "%"
    if gold.unit and answer.unit:
        return _value(gold.text, answer.text) if gold.unit == answer.unit else Outcome.WRONG
    if percents == (True, False) and not answer.unit:
        return _either(_value(gold.text, answer.text), _value(f"\\frac{{{gold.text}}}{{100}}", answer.text))
    if percents == (False, True) and not gold.unit:
        ratio = _value(gold.text, _hundredth(answer.text))
        number = parse_number(gold.text)
        return ratio if number and abs(number.value) <= 1 else _either(ratio, _value(gold.text, answer.text))
    return _value(gold.text, answer.text)


def _hundredth(text: str) -> str:
    number = parse_number(text)
    if number is None:
        return rf"\frac{{{text}}}{{100}}"
    value = number.value / 100
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _either(a: Outcome, b: Outcome) -> Outcome:
    return Outcome.RIGHT if Outcome.RIGHT in (a, b) else a


def _value(gold: str, answer: str) -> Outcome:
    """Two values without units, with the rule that nobody does the model's arithmetic."""
    if same_text(gold, answer):
        return Outcome.RIGHT
    infinities = [_INFINITY.fullmatch(text.strip()) for text in (gold, answer)]
    if infinities[0] or infinities[1]:
        signs = [found and found[1].replace("+", "") for found in infinities]
        return _of(None not in signs and signs[0] == signs[1])
    return _expressions(gold, answer, limit_operators=True)


def _expressions(gold: str, answer: str, *, limit_operators: bool = False) -> Outcome:
    numbers = parse_number(gold), parse_number(answer)
    if numbers[0] and numbers[1]:
        return _of(same_number(numbers[0], numbers[1]))
    try:
        expected = _expression(gold, numbers[0])
        rational(expected.root)
    except (Unparsed, TooLarge, ZeroDivisionError):
        return Outcome.UNPARSED_GOLD
    try:
        found = _expression(answer, numbers[1])
    except Unparsed:
        return Outcome.UNPARSED_ANSWER
    if limit_operators and not expected.symbols and found.operators > _allowed_operators(expected):
        return Outcome.WRONG
    try:
        same = same_expression(expected, found)
    except (TooLarge, ZeroDivisionError):
        return Outcome.WRONG
    return Outcome.UNKNOWN if same is None else _of(same)


def _expression(text: str, number: Number | None) -> Expression:
    return Expression.of(number) if number else parse_expression(text)


def _allowed_operators(gold: Expression) -> int:
    return MAX_OPERATORS_FOR_NUMBER if gold.operators == 0 else 2 * gold.operators + 6
