r"""The comparison ladder: the same text, number, structure or expression; what is left goes to the CAS.

``compare(gold, answer)`` takes cleaned strings and is pure, bounded and fast. Rungs, cheapest first: normalised
string; exact rational; decimal to six places; structure (tuple, set, interval, union, matrix, percent, unit,
assignment, equation, clock time, text); expression by evaluation. ``Outcome.UNKNOWN`` asks for the CAS.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from rltrain.rewards.verifier import labels
from rltrain.rewards.verifier.evaluate import constant_ratio
from rltrain.rewards.verifier.expression import Unparsed, parse_expression
from rltrain.rewards.verifier.number import parse_number, same_number
from rltrain.rewards.verifier.structure import (
    EVERYTHING,
    Cases,
    Clock,
    Condition,
    Equation,
    Items,
    Lettered,
    Matrix,
    Ratio,
    Relation,
    Structure,
    Union,
    has_grouped,
    parse_structure,
)
from rltrain.rewards.verifier.times import times_or_ratios
from rltrain.rewards.verifier.unit import Quantity
from rltrain.rewards.verifier.values import (
    Outcome,
    either,
    every,
    expressions,
    has_set_algebra,
    is_constant,
    is_readable,
    of,
    quantities,
    same_text,
)
from rltrain.rewards.verifier.words import Text, is_common

MAX_ITEMS = 32
_COORDINATES = (["x", "y"], ["x", "y", "z"], ["a", "b"], ["a", "b", "c"])
_MIRRORED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}


def compare(gold: str, answer: str, *, inequalities: bool = False) -> Outcome:
    """Is ``answer`` right for ``gold``? ``inequalities``: ``x >= 0`` may stand for the interval ``[0, oo)``."""
    if same_text(gold, answer) or (has_grouped(gold) and gold.replace(" ", "") == answer.replace(" ", "")):
        return Outcome.RIGHT  # 620,753 may be one number or two
    numbers = parse_number(gold), parse_number(answer)
    if numbers[0] and numbers[1]:
        return of(same_number(numbers[0], numbers[1]))
    expected = parse_structure(gold)
    grouped = not (isinstance(expected, Items) and numbers[1])
    found = parse_structure(answer, grouped=grouped)
    if inequalities:
        expected, found = as_interval(expected), as_interval(found)
    if _is_single(expected) != _is_single(found):  # {2} and 2
        expected, found = _only(expected), _only(found)
    outcome = structures(expected, found)
    if outcome is Outcome.RIGHT or not isinstance(expected, Items) or not (has_grouped(gold) or has_grouped(answer)):
        return outcome
    return either(outcome, structures(parse_structure(gold, grouped=False), parse_structure(answer, grouped=False)))


def compare_joined(gold: str, answers: Sequence[str]) -> Outcome:
    """Several joined boxes: the items of a gold set or list; for any other gold each of them must be right."""
    expected = parse_structure(gold)
    if isinstance(expected, Items) and not expected.ordered:
        return structures(expected, Items("", tuple(parse_structure(answer) for answer in answers)))
    return every([compare(gold, answer) for answer in answers])


def readable(structure: Structure) -> bool:
    """Can this gold be compared without the CAS?"""
    match structure:
        case Text() | Clock():
            return True
        case Quantity():
            return is_readable(structure.text)
        case Items():
            return all(map(readable, structure.items))
        case Union():
            return all(map(readable, structure.parts))
        case Matrix():
            return all(readable(cell) for row in structure.rows for cell in row)
        case Cases():
            return all(readable(part) for piece in structure.pieces for part in piece if part is not None)
        case Condition():
            return readable(structure.condition)
        case Lettered():
            return readable(structure.value)
        case Relation():
            return all(map(is_readable, structure.sides))
        case Ratio():
            return all(map(is_readable, structure.terms))
        case Equation():
            first = bool(labels.name_of(structure.sides[0]))
            return all(readable(parse_structure(side)) for side in structure.sides[first:])


# --- dispatch ----------------------------------------------------------------------------------------------------


def structures(gold: Structure, answer: Structure) -> Outcome:
    """Compare two structures; of different kinds, by the readings that the policy allows."""
    if isinstance(gold, Lettered) or isinstance(answer, Lettered):
        return _lettered(gold, answer)
    if isinstance(gold, Equation) or isinstance(answer, Equation):
        return _equations(gold, answer)
    if isinstance(gold, Condition) or isinstance(answer, Condition):
        return _conditions(gold, answer)
    if isinstance(gold, (Clock, Ratio)) or isinstance(answer, (Clock, Ratio)):
        return times_or_ratios(gold, answer)
    if gold == EVERYTHING and isinstance(answer, Relation):
        return structures(gold, as_interval(answer))
    match gold, answer:
        case Items(), Items():
            return _items(gold, answer)
        case (Text(), _) | (_, Text()):
            return _texts(gold, answer)
        case Quantity(), Quantity():
            return quantities(gold, answer)
        case Union(), Union():
            return _matched(gold.parts, answer.parts)
        case Matrix(), Matrix():
            return _matrices(gold, answer)
        case Cases(), Cases():
            return _cases(gold, answer)
        case Relation(), Relation():
            return _relations(gold, answer)
    sets = any(isinstance(side, Quantity) and has_set_algebra(side.text) for side in (gold, answer))
    return Outcome.UNKNOWN if sets else Outcome.WRONG


def _is_single(structure: Structure) -> bool:
    return isinstance(structure, Items) and structure.brackets == "{}" and len(structure.items) == 1


def _only(structure: Structure) -> Structure:
    return structure.items[0] if isinstance(structure, Items) and _is_single(structure) else structure


def _lettered(gold: Structure, answer: Structure) -> Outcome:
    """An option with its letter against another, against a letter or against a value."""
    if isinstance(gold, Lettered) and isinstance(answer, Lettered):
        return every([of(gold.letter == answer.letter), structures(gold.value, answer.value)])
    letters = [Text(side.letter.lower()) if isinstance(side, Lettered) else side for side in (gold, answer)]
    values = [side.value if isinstance(side, Lettered) else side for side in (gold, answer)]
    return either(structures(values[0], values[1]), structures(letters[0], letters[1]))


# --- lists, sets, tuples -----------------------------------------------------------------------------------------


def _items(gold: Items, answer: Items) -> Outcome:
    if gold.ordered != answer.ordered and (gold.brackets or "()") != (answer.brackets or "()"):
        return Outcome.WRONG  # a bare list may stand for a tuple, in the same order
    if gold.ordered or answer.ordered:
        gold, answer = _by_name(gold), _by_name(answer)
        if gold.ordered and answer.ordered and gold.brackets != answer.brackets:
            return Outcome.WRONG
        return _in_order(gold.items, answer.items)
    names = _names(gold.items), _names(answer.items)
    if len(names[0]) > 1 and not names[1] and not (labels.are_indexed(names[0]) and _is_root(names[0])):
        return _in_order(gold.items, answer.items)
    if len(names[1]) > 1 and len(names[0]) < 2:  # x_1 = 2, x_2 = 3 for 2, 3
        if not labels.are_indexed(names[1] | names[0]):
            return Outcome.WRONG
        gold, answer = (Items(side.brackets, tuple(map(_without_name, side.items))) for side in (gold, answer))
    if "{}" not in (gold.brackets, answer.brackets) and _repeats(gold.items):
        return _multiset(gold.items, answer.items)
    return _matched(gold.items, answer.items)


def _names(items: Sequence[Structure]) -> set[str]:
    return {name for item in items if isinstance(item, Equation) and (name := labels.name_of(item.sides[0]))}


def _is_root(names: set[str]) -> bool:
    return all(name[0] in "xz" for name in names)


def _by_name(side: Items) -> Items:
    """``y=4, x=3`` in the order of the coordinates."""
    names = [labels.name_of(item.sides[0]) for item in side.items if isinstance(item, Equation)]
    if side.ordered or len(names) != len(side.items) or sorted(map(str, names)) not in _COORDINATES:
        return side
    return Items(side.brackets, tuple(item for _, item in sorted(zip(names, side.items, strict=True), key=_first)))


def _first(pair: tuple[str | None, Structure]) -> str:
    return str(pair[0])


def _without_name(item: Structure) -> Structure:
    return parse_structure(item.sides[-1]) if isinstance(item, Equation) else item


def _in_order(gold: Sequence[Structure], answer: Sequence[Structure]) -> Outcome:
    if len(gold) != len(answer):
        return Outcome.WRONG
    return every([structures(a, b) for a, b in zip(gold, answer, strict=True)])


def _repeats(items: Sequence[Structure]) -> bool:
    """Does a list say the same thing twice?"""
    if len(items) > MAX_ITEMS:
        return False
    return any(structures(a, b) is Outcome.RIGHT for index, a in enumerate(items) for b in items[index + 1 :])


def _multiset(gold: Sequence[Structure], answer: Sequence[Structure]) -> Outcome:
    """Every gold item has an answer item of its own."""
    if len(gold) != len(answer) or len(gold) > MAX_ITEMS:
        return Outcome.WRONG
    left = list(answer)
    for item in gold:
        outcomes = [structures(item, other) for other in left]
        if Outcome.RIGHT not in outcomes:
            return _unmatched(outcomes)
        del left[outcomes.index(Outcome.RIGHT)]
    return Outcome.RIGHT


def _matched(gold: Sequence[Structure], answer: Sequence[Structure]) -> Outcome:
    """The same set: every gold item has its answer and every answer its gold item."""
    if max(len(gold), len(answer)) > MAX_ITEMS:
        return Outcome.WRONG
    table = [[structures(a, b) for b in answer] for a in gold]
    lines = table + [list(column) for column in zip(*table, strict=True)]
    outcomes = [Outcome.RIGHT if Outcome.RIGHT in line else _unmatched(line) for line in lines]
    return every(outcomes)


def _unmatched(line: Sequence[Outcome]) -> Outcome:
    return next((outcome for outcome in line if outcome is not Outcome.WRONG), Outcome.WRONG)


def _matrices(gold: Matrix, answer: Matrix) -> Outcome:
    shapes = [[len(row) for row in matrix.rows] for matrix in (gold, answer)]
    if shapes[0] != shapes[1] or gold.determinant != answer.determinant or sum(shapes[0]) > 4 * MAX_ITEMS:
        return Outcome.WRONG
    pairs = [
        structures(a, b)
        for gold_row, answer_row in zip(gold.rows, answer.rows, strict=True)
        for a, b in zip(gold_row, answer_row, strict=True)
    ]
    return every(pairs)


# --- texts ----------------------------------------------------------------------------------------


def _texts(gold: Structure, answer: Structure) -> Outcome:
    words = [_plain_words(structure) for structure in (gold, answer)]
    if words[0] is not None and words[0] == words[1]:
        return Outcome.RIGHT
    raw = [_algebra(structure) for structure in (gold, answer)]
    if raw[0] and raw[1] and not any(map(is_common, raw)):
        return of(expressions(raw[0], raw[1]) is Outcome.RIGHT)
    return Outcome.WRONG


def _plain_words(structure: Structure) -> str | None:
    if isinstance(structure, Text):
        return structure.words
    if isinstance(structure, Quantity) and structure.text.isalpha() and not structure.unit:
        return structure.text.casefold()
    return None


def _algebra(structure: Structure) -> str:
    """The text of letters that may have been a product after all."""
    return structure.raw if isinstance(structure, (Text, Quantity)) else ""


# --- conditions and pieces ---------------------------------------------------------------------------------------


def _conditions(gold: Structure, answer: Structure) -> Outcome:
    r"""``\{x | c\}`` against another such set, whatever its variable, or against an interval."""
    if isinstance(gold, Condition) and isinstance(answer, Condition):
        return structures(gold.condition, _renamed(answer, gold.variable))
    sides = [_condition_interval(side) for side in (gold, answer)]
    if sides[0] is None or sides[1] is None:
        return Outcome.WRONG
    return structures(sides[0], sides[1])


def _condition_interval(structure: Structure) -> Structure | None:
    if not isinstance(structure, Condition):
        return structure
    interval = as_interval(structure.condition)
    return None if interval is structure.condition else interval


def _renamed(answer: Condition, variable: str) -> Structure:
    if answer.variable == variable:
        return answer.condition
    if not (len(variable) == len(answer.variable) == 1):
        return Text("another variable")
    letter = re.compile(rf"(?<![\\a-zA-Z]){answer.variable}(?![a-zA-Z])")

    def rename(structure: Structure) -> Structure:
        match structure:
            case Relation():
                return Relation(tuple(letter.sub(variable, side) for side in structure.sides), structure.operators)
            case Equation():
                return Equation(tuple(letter.sub(variable, side) for side in structure.sides), structure.rounded)
            case Items():
                return Items(structure.brackets, tuple(map(rename, structure.items)))
        return structure

    return rename(answer.condition)


def _cases(gold: Cases, answer: Cases) -> Outcome:
    """The same pieces in any order; "otherwise" stands for the one condition that is left."""
    if len(gold.pieces) != len(answer.pieces) or len(gold.pieces) > MAX_ITEMS:
        return Outcome.WRONG
    left = sorted(answer.pieces, key=lambda piece: piece[1] is None)
    for value, condition in sorted(gold.pieces, key=lambda piece: piece[1] is None):
        outcomes = [every([structures(value, other), _same_condition(condition, rule)]) for other, rule in left]
        if Outcome.RIGHT not in outcomes:
            return _unmatched(outcomes)
        del left[outcomes.index(Outcome.RIGHT)]
    return Outcome.RIGHT


def _same_condition(gold: Structure | None, answer: Structure | None) -> Outcome:
    if gold is None or answer is None:
        return Outcome.RIGHT
    return structures(gold, answer)


# --- equations and inequalities ----------------------------------------------------------------------------------


def _relations(gold: Relation, answer: Relation) -> Outcome:
    if len(gold.sides) != len(answer.sides):
        return Outcome.WRONG
    if len(gold.sides) > 2:
        pairs = [quantities(Quantity(a), Quantity(b)) for a, b in zip(gold.sides, answer.sides, strict=True)]
        return every(pairs) if gold.operators == answer.operators else Outcome.WRONG
    try:
        sides = [[parse_expression(side) for side in relation.sides] for relation in (gold, answer)]
    except Unparsed:
        return of(gold.operators == answer.operators and all(map(same_text, gold.sides, answer.sides)))
    ratio = constant_ratio(*sides)
    operator, other = gold.operators[0], answer.operators[0]
    if ratio is None or ratio.imag:
        return Outcome.WRONG
    return of(other == (operator if ratio.real > 0 else _MIRRORED[operator]))


def as_interval(structure: Structure) -> Structure:
    """``a < x <= b`` as ``(a, b]``; a list of inequalities as a union; anything else unchanged."""
    if isinstance(structure, Items) and not structure.ordered:
        parts = tuple(as_interval(item) for item in structure.items)
        return Union(parts) if all(isinstance(part, Items) for part in parts) else structure
    if not isinstance(structure, Relation):
        return structure
    sides, operators = structure.sides, structure.operators
    if operators == (r"\ne",) and sides[0].isalpha():
        point = Quantity(sides[1])
        return Union((Items("()", (Quantity(r"-\infty"), point)), Items("()", (point, Quantity(r"\infty")))))
    if r"\ne" in operators:
        return structure
    opening, closing = ("(" if operators[0] == "<" else "["), (")" if operators[-1] == "<" else "]")
    if len(sides) == 3 and sides[1].isalpha():
        return Items(opening + closing, (Quantity(sides[0]), Quantity(sides[2])))
    if len(sides) == 2 and sides[1].isalpha() and operators[0] in ("<", r"\le"):
        return Items(f"{opening})", (Quantity(sides[0]), Quantity(r"\infty")))
    if len(sides) == 2 and sides[0].isalpha() and operators[0] in ("<", r"\le"):
        return Items(f"({closing}", (Quantity(r"-\infty"), Quantity(sides[1])))
    return structure


def _equations(gold: Structure, answer: Structure) -> Outcome:
    if isinstance(gold, Equation) and isinstance(answer, Equation):
        return _two_equations(gold, answer)
    if isinstance(gold, Equation):
        return either(*(_gold_value(side, answer) for side in _gold_sides(gold)), Outcome.WRONG)
    assert isinstance(answer, Equation)
    constant = not isinstance(gold, Quantity) or is_constant(gold.text)
    sides = labels.value_sides(answer, gold=False, constant=constant)
    exact = [side for side, rounded in sides if not rounded] or [side for side, _ in sides]
    if not exact:
        return Outcome.WRONG
    near = [side for side, rounded in sides if rounded and side not in exact]
    if not all(labels.is_rounding(exact[-1], side) for side in near):
        return Outcome.WRONG
    last = structures(gold, parse_structure(exact[-1]))
    stated = every([last, *(_value_equal(gold, side) for side in exact[:-1])])
    return either(stated, *(structures(gold, parse_structure(side)) for side in near))


def _gold_sides(gold: Equation) -> list[str]:
    """What may be answered for a gold equation: its exact value, or the rounding that stands beside it."""
    sides = labels.value_sides(gold, gold=True, constant=False)
    exact = [side for side, rounded in sides if not rounded]
    return exact[-1:] + [side for side, rounded in sides if rounded]


def _gold_value(side: str, answer: Structure) -> Outcome:
    return structures(parse_structure(side), answer)


def _value_equal(gold: Structure, side: str) -> Outcome:
    found = parse_structure(side)
    if isinstance(gold, Quantity):
        return expressions(gold.text, found.text if isinstance(found, Quantity) else side)
    return structures(gold, found)


def _two_equations(gold: Equation, answer: Equation) -> Outcome:
    answer = labels.with_argument(answer, labels.name_of(gold.sides[0]))
    names = labels.name_of(gold.sides[0]), labels.name_of(answer.sides[0])
    if names[0] and names[1] and labels.same_name(names[0], names[1]) and _gold_sides(gold):
        rest = Equation(answer.sides[1:], (False, *answer.rounded[2:]))
        found = parse_structure(rest.sides[0]) if len(rest.sides) == 1 else rest
        return either(*(_gold_value(side, found) for side in _gold_sides(gold)), Outcome.WRONG)
    if any(gold.rounded) and not names[0]:
        return either(*(_gold_value(side, answer) for side in _gold_sides(gold)), Outcome.WRONG)
    if max(len(gold.sides), len(answer.sides)) > 2:
        return _chains(gold, answer)
    left, right = answer.sides[0], answer.sides[-1]
    if names[0] and is_constant(gold.sides[-1]):  # solved: what is left to solve is not the answer
        return expressions(gold.sides[-1], left) if names[0] == labels.name_of(right) else Outcome.WRONG
    return _same_solutions(gold.sides, answer.sides)


def _same_solutions(gold: Sequence[str], answer: Sequence[str]) -> Outcome:
    """Two equations that differ by a constant factor."""
    try:
        sides = [parse_expression(side) for side in (*gold, *answer)]
    except Unparsed:
        return of(all(map(same_text, gold, answer)) or all(map(same_text, gold, reversed(answer))))
    return of(constant_ratio(sides[:2], sides[2:]) is not None)


def _chains(gold: Equation, answer: Equation) -> Outcome:
    """``a = b = c`` link by link, in either direction."""
    if len(gold.sides) != len(answer.sides):
        return Outcome.WRONG
    links = [tuple(pairwise(sides)) for sides in (gold.sides, answer.sides, answer.sides[::-1])]
    return either(
        every([_same_solutions(a, b) for a, b in zip(links[0], links[1], strict=True)]),
        every([_same_solutions(a, b) for a, b in zip(links[0], links[2], strict=True)]),
    )
