r"""Names on the left of a value, and approximations beside it.

On the gold's side only a name is a label: ``x``, ``f(2)``, ``AB``, ``\text{Area}``. On the answer's side a number may
also follow what it is the value of: ``m+n = 113``.
"""

from __future__ import annotations

import re
from fractions import Fraction

from rltrain.rewards.verifier.evaluate import rounds_constant
from rltrain.rewards.verifier.expression import Expression, Unparsed, parse_expression
from rltrain.rewards.verifier.number import Number, parse_number
from rltrain.rewards.verifier.structure import Equation
from rltrain.rewards.verifier.unit import parse_quantity
from rltrain.rewards.verifier.values import is_constant

_INDEX = r"(?:\s*_\s*(?:\{[^{}=]*\}|[a-zA-Z0-9]|\\[a-zA-Z]+)|')*"
_ACCENT = r"\\(?:vec|hat|bar|overline|overrightarrow|tilde|dot|widehat|mathbb)\s*(?:\{[^{}=]*\}|[a-zA-Z])"
_LETTER = (
    rf"(?:{_ACCENT}|\\(?!frac|d?frac|sqrt|sum|int|prod|lim|sin|cos|tan|cot|sec|csc|ln|log|exp|text|begin)[a-zA-Z]+"
    r"|[a-zA-Z])"
)
_SYMBOL = rf"{_LETTER}{_INDEX}"
_NAME = re.compile(
    rf"(?:{_SYMBOL}|\\(?:Delta|angle|measuredangle|triangle|odot|arc)\s*[a-zA-Z]{{1,4}}{_INDEX}|m\s*\\angle\s*[A-Z]{{1,4}}"
    rf"|[A-Z]{{2,4}}|\|\s*(?:[A-Z]{{2}}|{_ACCENT})\s*\||\[[A-Z]{{3,6}}\]|S_?\{{?\\triangle\s*[A-Z]+\}}?"
    rf"|(?:{_SYMBOL})\s*(?:\([^()=]*(?:\([^()=]*\)[^()=]*)?\)|\[[A-Z]\])(?:\s*\([^()=]*\))?"
    rf"|\\frac\s*\{{\s*(?:d|\\partial)[^{{}}]*\}}\s*\{{\s*(?:d|\\partial)[^{{}}]*\}}|d\s*[a-z]\s*/\s*d\s*[a-z]"
    rf"|\\(?:sin|cos|tan|cot|sec|csc|ln|log)(?:_\{{?\w\}}?)?\s*(?:{_SYMBOL}|\(\s*{_SYMBOL}\s*\)|[A-Z]{{2,3}}|\\angle\s*[A-Z]{{1,3}})"
    rf"|\(\s*{_SYMBOL}(?:\s*,\s*{_SYMBOL})*\s*\)|(?:\\text\s*\{{[^{{}}]*\}}\s*)+(?:_\{{?\w+\}}?|\([^()=]*\))?"
    r"|(?:P|\\Pr|\\mathbb\{P\})\s*\([^()]*(?:\([^()]*\)[^()]*)?\)"
    r"|[a-zA-Z]{3,}(?:\s+[a-zA-Z]+){0,3}|[\u4e00-\u9fff]{1,12})\s*"
)
_PRODUCT = re.compile(r"[xyzab]\s*\([^()]*[-+*/^\d][^()]*\)")  # x(y+1) is no function
_ITERATED = re.compile(r"\\(?:sum|prod|i*int|oint|lim|binom|max|min|sup|inf|gcd|lcm|det|frac\{d|Pr)(?![a-zA-Z])")
_LOOSE = re.compile(r"(?:[a-zA-Z]|\\[a-zA-Z]+|\|)[^=<>]{0,64}|\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\)")
_FUNCTION_OF_X = re.compile(r"[a-zA-Z]\(x\)")
_CALL = re.compile(r"(?P<head>[a-zA-Z])\((?P<letter>[a-zA-Z])\)")
_INDEXED = re.compile(r"(?P<base>.+?)(?:_\{?(?P<index>\d)\}?|(?P<primes>'*))")


def name_of(text: str) -> str | None:
    """The name that ``text`` is, without spaces; None if it is a value, a product or a condition."""
    text = text.strip()
    if not _NAME.fullmatch(text) or _PRODUCT.fullmatch(text) or text in ("e", r"\pi"):
        return None
    return re.sub(r"\\text\s*\{([^{}]*)\}|\s+", r"\1", text).replace("{", "").replace("}", "")


def stated(text: str, *, constant: bool) -> bool:
    """May the rest of an answer's equation be the value of its side ``text``? ``constant``: that of a number."""
    if name_of(text) or _ITERATED.search(text):
        return True
    if not constant:
        return False
    try:
        symbols = parse_expression(text).symbols
    except Unparsed:
        return bool(_LOOSE.fullmatch(text))
    outside = re.sub(r"[\^_]\s*(?:\{[^{}]*\}|\w)", "", text)
    return len(symbols) > 1 or (bool(symbols) and not re.search(r"\d", outside))


def same_name(a: str, b: str) -> bool:
    """The same name; ``y`` and ``f(x)`` are one."""
    return a == b or ("y" in (a, b) and any(_FUNCTION_OF_X.fullmatch(name) for name in (a, b)))


def with_argument(equation: Equation, gold_name: str | None) -> Equation:
    """``f(n) = n+1`` for a gold that calls it ``f(x)``, with the gold's letter."""
    call = _CALL.fullmatch(equation.sides[0].replace(" ", ""))
    wanted = _CALL.fullmatch(gold_name or "")
    if not call or not wanted or call["head"] != wanted["head"] or call["letter"] == wanted["letter"]:
        return equation
    letter = re.compile(rf"(?<![\\a-zA-Z]){call['letter']}(?![a-zA-Z])")
    if any(letter.sub("", side) != side and wanted["letter"] in side for side in equation.sides[1:]):
        return equation  # the new letter stands there already
    return Equation(tuple(letter.sub(wanted["letter"], side) for side in equation.sides), equation.rounded)


def are_indexed(names: set[str]) -> bool:
    """``x_1, x_2`` or ``x, x'``: one letter with different indices, so the names do not tell the values apart."""
    found = [_INDEXED.fullmatch(name) for name in names]
    return len({match["base"] for match in found if match}) == 1 and len(names) > 1


# --- values of an equation ---------------------------------------------------------------------------------------


def value_sides(equation: Equation, *, gold: bool, constant: bool) -> tuple[tuple[str, bool], ...]:
    """``(side, rounded)`` for the sides that state the value: ``x = 10/2 = 5`` gives ``10/2`` and ``5``.

    Nothing for a condition. ``constant``: the other side of the comparison is a number.
    """
    sides = tuple(zip(equation.sides, equation.rounded, strict=True))
    first, last = equation.sides[0], equation.sides[-1]
    if _defines(first, equation.sides[1:]) or (
        not gold and not is_constant(first) and stated(first, constant=constant)
    ):
        return sides[1:]
    if len(sides) == 2 and (
        _defines(last, equation.sides[:1]) or (not gold and not is_constant(last) and stated(last, constant=constant))
    ):
        return sides[:1]
    return sides if all(is_constant(parse_quantity(side).text) for side in equation.sides) else ()


def _defines(name: str, rest: tuple[str, ...]) -> bool:
    """Is the side a name for the others? Not where it stands in them too, as in ``b = a + ab``."""
    if not name_of(name):
        return False
    try:
        symbols = parse_expression(name).symbols if len(name.strip()) == 1 else frozenset[str]()
        return not any(symbols & parse_expression(side).symbols for side in rest)
    except Unparsed:
        return True


def is_rounding(exact: str, rounded: str) -> bool:
    """Is the second side the first rounded to its last digit (``\\frac{1}{3}`` and ``33.3\\%``)?"""
    whole, part = parse_quantity(exact), parse_quantity(rounded)
    number, value = parse_number(part.text), parse_number(whole.text)
    if number is None:
        return False
    share = 100 if part.unit == "%" and whole.unit != "%" else 1
    text = str(number.value.numerator)
    ulp = number.ulp if number.decimal else 10 ** (len(text) - len(text.rstrip("0"))) if number.value else 1
    coarse = Number(value=number.value / share, decimal=True, ulp=Fraction(ulp) / share, significant=1)
    try:
        expression = Expression.of(Number(value=value.value)) if value else parse_expression(whole.text)
    except Unparsed:
        return False
    return rounds_constant(expression, coarse, least=1)
