"""Exact arithmetic on text: numbers, ``+ - * / ^`` and parentheses, as fractions, bounded in every size.

A model writes these texts. Nothing is evaluated as code, and no text takes more than a fraction of a millisecond.
"""

from __future__ import annotations

import re
from fractions import Fraction

from rltrain.data.expressions import PLAIN, apply, value_text

MAX_CHARACTERS, MAX_DEPTH, MAX_EXPONENT, MAX_DIGITS = 256, 32, 64, 100
MAX_BITS = int(MAX_DIGITS * 3.3219281)  # of 10^MAX_DIGITS: a numerator or denominator of more is too large

_TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]*)?|\.[0-9]+)|(\*\*|[-+*/^()]))")
_SAME = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})


class CalculationError(ValueError):
    """Why a text has no value, in a few words."""


def calculate(text: str) -> str:
    """The value as an integer or a fraction in lowest terms, ``-7/3``.

    ``^`` and ``**`` bind to the right and before a sign on their left (-2^2 = -4). An exponent is an integer of at most
    64 in size. CalculationError: "division by zero", "not a number or + - * / ^ ( )", "too long", "too deep",
    "too large", "exponent", "incomplete".
    """
    if len(text) > MAX_CHARACTERS:
        raise CalculationError("too long")
    parser = _Calculation(_tokens(text.translate(_SAME)))
    value = parser.sum()
    if parser.peek():
        raise CalculationError("incomplete")
    return value_text(value, PLAIN)


def _tokens(text: str) -> list[str]:
    tokens, position, text = [], 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise CalculationError("not a number or + - * / ^ ( )")
        tokens.append(match[1] or match[2])
        position = match.end()
    return tokens


def _bounded(value: Fraction | None) -> Fraction:
    if value is None:
        raise CalculationError("division by zero")
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise CalculationError("too large")
    return value


class _Calculation:
    """Recursive descent: sum > product > sign > power > atom; values are computed on the way."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.position, self.depth = tokens, 0, 0

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        if not token:
            raise CalculationError("incomplete")
        self.position += 1
        return token

    def sum(self) -> Fraction:
        value = self.product()
        while self.peek() in ("+", "-"):
            value = _bounded(apply(self.take(), value, self.product()))
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while self.peek() in ("*", "/"):
            value = _bounded(apply(self.take(), value, self.signed()))
        return value

    def signed(self) -> Fraction:
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        return sign * self.power()

    def power(self) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise CalculationError("too deep")
        value = self.atom()
        if self.peek() in ("^", "**"):
            self.take()
            value = _power(value, self.signed())
        self.depth -= 1
        return value

    def atom(self) -> Fraction:
        token = self.take()
        if token == "(":
            value = self.sum()
            if self.take() != ")":
                raise CalculationError("incomplete")
            return value
        if not token[0].isdigit() and token[0] != ".":
            raise CalculationError("incomplete")
        return _bounded(Fraction(token if token[-1] != "." else token[:-1]))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
        raise CalculationError("exponent")
    if not base and exponent < 0:
        raise CalculationError("division by zero")
    if max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(int(exponent)) > 2 * MAX_BITS:
        raise CalculationError("too large")
    return _bounded(base ** int(exponent))
