r"""Arithmetic expressions as binary trees: exact value, split key, printing, parsing, worked solutions.

Every printed form is read back as the same tree: operators of one precedence associate to the left, and an operand
that would be read otherwise stands in parentheses.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import NamedTuple

PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
MASK_64 = (1 << 64) - 1
OPERATOR_SALT = {"+": 0x9E3779B97F4A7C15, "-": 0xC2B2AE3D27D4EB4F, "*": 0x165667B19E3779F9, "/": 0x27D4EB2F165667C5}


class ArithmeticExpression(NamedTuple):
    """A number (``operator`` empty, ``text`` as printed) or two expressions joined by a binary operator.

    ``key`` is a 64-bit structural hash in which the two sides of an operator are interchangeable.
    """

    steps: int
    value: Fraction
    key: int
    operator: str = ""
    text: str = ""
    left: ArithmeticExpression | None = None
    right: ArithmeticExpression | None = None


@dataclass(frozen=True, kw_only=True)
class Notation:
    """How operators, the equals sign and fractions are printed."""

    operators: dict[str, str]
    equals: str
    fraction: str


LATEX = Notation(
    operators={"+": " + ", "-": " - ", "*": r" \times ", "/": r" \div "}, equals=" = ", fraction=r"\frac{%d}{%d}"
)
PLAIN = Notation(operators={"+": "+", "-": "-", "*": "*", "/": "/"}, equals="=", fraction="%d/%d")


@cache
def _number_key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def number(text: str, value: Fraction) -> ArithmeticExpression:
    """A leaf."""
    return ArithmeticExpression(0, value, _number_key(text), "", text)


def join_key(operator: str, one: int, other: int) -> int:
    """The key of ``one operator other``, the same for ``other operator one`` (splitmix64 of the salted sum)."""
    x = (one + other + OPERATOR_SALT[operator]) & MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK_64
    return x ^ (x >> 31)


def apply(operator: str, left: Fraction, right: Fraction) -> Fraction | None:
    """The exact value, or None for a division by zero."""
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    return left / right if right else None


def subexpressions(expression: ArithmeticExpression) -> Iterator[ArithmeticExpression]:
    """Every node that has an operator, operands first."""
    if expression.left is not None and expression.right is not None:
        yield from subexpressions(expression.left)
        yield from subexpressions(expression.right)
        yield expression


def render(expression: ArithmeticExpression, notation: Notation) -> str:
    """The printed form, with the fewest parentheses that keep the tree."""
    if expression.left is None or expression.right is None:
        return expression.text
    level = PRECEDENCE[expression.operator]
    left, right = render(expression.left, notation), render(expression.right, notation)
    if expression.left.operator and PRECEDENCE[expression.left.operator] < level:
        left = f"({left})"
    # The right side also at equal precedence: a-(b+c), and a+(b+c) so that the tree can be read back.
    if expression.right.operator and PRECEDENCE[expression.right.operator] <= level:
        right = f"({right})"
    return f"{left}{notation.operators[expression.operator]}{right}"


def value_text(value: Fraction, notation: Notation) -> str:
    """A value as an integer or a fraction in lowest terms, the sign in front."""
    over, under = value.numerator, value.denominator
    if under == 1:
        return str(over)
    return notation.fraction % (over, under) if over > 0 else "-" + notation.fraction % (-over, under)


def worked_steps(expression: ArithmeticExpression, notation: Notation) -> list[str]:
    """One line per operator in order of evaluation, such as ``3+4=7`` and ``7*2=14`` for ``(3+4)*2``."""
    lines: list[str] = []

    def reduced(node: ArithmeticExpression) -> str:
        if node.left is None or node.right is None:
            return node.text
        left, right = reduced(node.left), reduced(node.right)
        if right[0] == "-":
            right = f"({right})"
        value = value_text(node.value, notation)
        lines.append(f"{left}{notation.operators[node.operator]}{right}{notation.equals}{value}")
        return value

    reduced(expression)
    return lines


_TOKEN = re.compile(
    r"\s*(?:(?P<number>\\frac\{(?P<over>\d+)\}\{(?P<under>\d+)\}|(?P<base>\d+)(?:\^\{(?P<power>\d)\})?)"
    r"|(?P<symbol>[-+*/()]|\\times|\\div))"
)
_SYMBOLS = {r"\times": "*", r"\div": "/"}


def _tokens(text: str) -> Iterator[ArithmeticExpression | str]:
    position = 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if not match:
            raise ValueError(f"expression {text!r}: cannot read {text[position : position + 20]!r}")
        position = match.end()
        if match["symbol"]:
            yield _SYMBOLS.get(match["symbol"], match["symbol"])
        elif match["over"]:
            yield number(match["number"], Fraction(int(match["over"]), int(match["under"])))
        else:
            yield number(match["number"], Fraction(int(match["base"]) ** int(match["power"] or 1)))


def _joined(left: ArithmeticExpression, operator: str, right: ArithmeticExpression) -> ArithmeticExpression:
    value = apply(operator, left.value, right.value)
    if value is None:
        raise ValueError("expression: division by zero")
    key = join_key(operator, left.key, right.key)
    return ArithmeticExpression(left.steps + right.steps + 1, value, key, operator, "", left, right)


def parse(text: str) -> ArithmeticExpression:
    """The tree of a printed form, by precedence climbing; ValueError if it is none."""
    tokens = [*_tokens(text), ")"]

    def operand() -> ArithmeticExpression:
        token = tokens.pop(0)
        if isinstance(token, ArithmeticExpression):
            return token
        if token != "(":
            raise ValueError(f"expression {text!r}: a number or '(' is missing before {token!r}")
        inside = chain(1)
        if not tokens or tokens.pop(0) != ")":
            raise ValueError(f"expression {text!r}: a ')' is missing")
        return inside

    def chain(level: int) -> ArithmeticExpression:
        left = operand()
        while tokens and isinstance(tokens[0], str) and PRECEDENCE.get(tokens[0], 0) >= level:
            operator = str(tokens.pop(0))
            left = _joined(left, operator, chain(PRECEDENCE[operator] + 1))
        return left

    whole = chain(1)
    if tokens != [")"]:
        raise ValueError(f"expression {text!r}: cannot read what follows {render(whole, LATEX)!r}")
    return whole
