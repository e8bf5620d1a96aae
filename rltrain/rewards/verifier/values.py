r"""Two values: numbers, expressions and quantities with units, as text; the leaves of the comparison."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence

from rltrain.rewards.verifier.evaluate import TooLarge, rational, rounds_constant, same_expression
from rltrain.rewards.verifier.expression import Expression, Unparsed, parse_expression
from rltrain.rewards.verifier.number import Number, parse_number, same_number
from rltrain.rewards.verifier.unit import Quantity, letter_unit

MAX_OPERATORS_FOR_NUMBER = 1  # 2^3 for 8 is tolerated; a longer sum is the question, not its answer
MAX_NAME = 64

_SPACE = re.compile(r"(?<![a-zA-Z0-9.,])\s+|\s+(?![a-zA-Z0-9.,])")
_INFINITY = re.compile(r"([+-]?)\s*(?:\\infty|inf|infinity|oo)", re.IGNORECASE)
_SET_ALGEBRA = re.compile(r"\\(?:setminus|backslash|cap|bigcap|complement)(?![a-zA-Z])")
_NAME = re.compile(
    r"\\(?:angle|measuredangle|triangle|odot|square|parallelogram|mathbb|overset|underset|partial|aleph|arc|frown|perp|"
    r"parallel|cong|sim|to|rightarrow|Rightarrow|iff|Leftrightarrow)(?![a-zA-Z])|\\frac\s*\{\s*d|(?<![a-z])d[a-z]?/d[a-z]"
)


class Outcome(enum.Enum):
    """RIGHT and WRONG are final; the others say what could not be told, and why."""

    RIGHT = "same"
    WRONG = "different"
    UNKNOWN = "cannot be told by evaluation"
    UNPARSED_GOLD = "the gold cannot be parsed"
    UNPARSED_ANSWER = "the answer cannot be parsed"


def of(same: bool) -> Outcome:
    """RIGHT or WRONG."""
    return Outcome.RIGHT if same else Outcome.WRONG


def every(outcomes: Sequence[Outcome]) -> Outcome:
    """WRONG if any is; else the first that is not RIGHT."""
    if Outcome.WRONG in outcomes:
        return Outcome.WRONG
    return next((outcome for outcome in outcomes if outcome is not Outcome.RIGHT), Outcome.RIGHT)


def either(*outcomes: Outcome) -> Outcome:
    """RIGHT if any is; else the first."""
    return Outcome.RIGHT if Outcome.RIGHT in outcomes else outcomes[0]


def same_text(gold: str, answer: str) -> bool:
    """Equal but for spaces that do not separate letters or digits: ``1 2`` is not ``12``."""
    return gold == answer or _SPACE.sub("", gold) == _SPACE.sub("", answer)


def is_name(text: str) -> bool:
    r"""A notation that stands for itself and is compared as written: ``\angle ABC``, ``\mathbb{Z}``."""
    return len(text) <= MAX_NAME and bool(_NAME.search(text)) and not _SET_ALGEBRA.search(text)


def has_set_algebra(text: str) -> bool:
    """Differences and intersections of sets, which only the CAS reads."""
    return bool(_SET_ALGEBRA.search(text) or r"\mathbb" in text)


def is_readable(text: str) -> bool:
    """Can this value be compared without the CAS?"""
    if parse_number(text) or _INFINITY.fullmatch(text.strip()) or is_name(text):
        return True
    try:
        rational(parse_expression(text).root)
    except (Unparsed, TooLarge, ZeroDivisionError):
        return False
    return True


def is_constant(text: str) -> bool:
    """An expression without symbols."""
    try:
        return not parse_expression(text).symbols
    except Unparsed:
        return parse_number(text) is not None


# --- expressions -------------------------------------------------------------------------------------------------


def expressions(gold: str, answer: str, *, limit_operators: bool = False) -> Outcome:
    """Two expressions as text. ``limit_operators``: an answer that leaves several operations to do is wrong."""
    numbers = parse_number(gold), parse_number(answer)
    if numbers[0] and numbers[1]:
        return of(same_number(numbers[0], numbers[1]))
    try:
        expected = _expression(gold, numbers[0])
        rational(expected.root)
    except (Unparsed, TooLarge, ZeroDivisionError):
        if is_name(gold):
            return of("".join(gold.split()) == "".join(answer.split()))
        return Outcome.UNPARSED_GOLD
    try:
        found = _expression(answer, numbers[1])
    except Unparsed:
        return Outcome.UNPARSED_ANSWER
    if limit_operators and not expected.symbols and found.operators > _allowed_operators(expected):
        return Outcome.WRONG
    if (numbers[1] and rounds_constant(expected, numbers[1])) or (numbers[0] and rounds_constant(found, numbers[0])):
        return Outcome.RIGHT
    try:
        same = same_expression(expected, found)
    except (TooLarge, ZeroDivisionError):
        return Outcome.WRONG
    return Outcome.UNKNOWN if same is None else of(same)


def _expression(text: str, number: Number | None) -> Expression:
    return Expression.of(number) if number else parse_expression(text)


def _allowed_operators(gold: Expression) -> int:
    return MAX_OPERATORS_FOR_NUMBER if gold.operators == 0 else 2 * gold.operators + 6


def value(gold: str, answer: str) -> Outcome:
    """Two values without units, with the rule that nobody does the model's arithmetic."""
    if same_text(gold, answer):
        return Outcome.RIGHT
    infinities = [_INFINITY.fullmatch(text.strip()) for text in (gold, answer)]
    if infinities[0] or infinities[1]:
        signs = [found and found[1].replace("+", "") for found in infinities]
        return of(None not in signs and signs[0] == signs[1])
    return expressions(gold, answer, limit_operators=True)


# --- quantities --------------------------------------------------------------------------------------------------


def quantities(gold: Quantity, answer: Quantity) -> Outcome:
    """Values with units: one may lack it, two must be the same unit; percent is also a hundredth."""
    outcome = _with_units(gold, answer)
    if outcome is Outcome.RIGHT or not (gold.unit or answer.unit):
        return outcome if outcome is Outcome.RIGHT else _letter_units(gold, answer, outcome)
    if gold.bare or answer.bare:  # the letters may have been variables
        return either(outcome, expressions(gold.raw or gold.text, answer.raw or answer.text))
    return _letter_units(gold, answer, outcome)


def _with_units(gold: Quantity, answer: Quantity) -> Outcome:
    if gold.unit and answer.unit:
        if gold.unit != answer.unit:
            return Outcome.WRONG
        return _residues(gold, answer) if gold.unit.startswith("mod ") else value(gold.text, answer.text)
    if answer.unit.startswith(("base ", "mod ")):  # these may be left out, not added
        return Outcome.WRONG
    if gold.unit == "%" and not answer.unit:
        return either(value(gold.text, answer.text), value(_hundredth(gold.text), answer.text))
    if answer.unit == "%" and not gold.unit:
        number, ratio = parse_number(gold.text), value(gold.text, _hundredth(answer.text))
        return ratio if number and abs(number.value) <= 1 else either(ratio, value(gold.text, answer.text))
    return value(gold.text, answer.text)


def _letter_units(gold: Quantity, answer: Quantity, outcome: Outcome) -> Outcome:
    """``10 m`` is ten metres where the other side says so in full, else ten times m."""
    for side, other in ((gold, answer), (answer, gold)):
        read = letter_unit(side.raw or side.text)
        if read and other.unit and other.unit == read.unit and not other.bare:
            texts = (read.text, other.text) if side is gold else (other.text, read.text)
            return value(*texts)
    return outcome


def _residues(gold: Quantity, answer: Quantity) -> Outcome:
    a, b = parse_number(gold.text), parse_number(answer.text)
    if a and b and a.value.denominator == b.value.denominator == 1:
        return of((a.value - b.value) % int(gold.unit.removeprefix("mod ")) == 0)
    return value(gold.text, answer.text)


def _hundredth(text: str) -> str:
    number = parse_number(text)
    if number is None:
        return rf"\frac{{{text}}}{{100}}"
    share = number.value / 100
    return rf"\frac{{{share.numerator}}}{{{share.denominator}}}"
