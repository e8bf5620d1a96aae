r"""Numeric literals as exact rationals, and when two of them are the same number.

A literal is a sign, digits (grouped by ``,``, ``{,}`` or thin spaces), one point, an exponent or ``\times 10^{k}``,
a simple or mixed fraction of integers, or a repeating decimal. Anything with an operator left to do is not one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

RELATIVE_TOLERANCE = Fraction(1, 10**6)
ZERO_TOLERANCE = Fraction(1, 10**12)
MAX_EXPONENT = 1000

_DIGITS = r"(?:\d{1,3}(?:(?:,|\\,)\d{3})+|\d+)"
_EXPONENT = r"(?:\{\s*(?P<k>[+-]?\s*\d+)\s*\}|\(?(?P<k1>[+-]?\d+)\)?)"
_DECIMAL = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<whole>{_DIGITS})?"
    r"(?:\.(?P<part>\d*)(?:\\overline\s*(?:\{(?P<repeat>\d+)\}|(?P<one>\d)))?)?"
    rf"(?:[eE](?P<e>[+-]?\d+)|\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*{_EXPONENT})?"
)
_POWER_OF_TEN = re.compile(rf"(?P<sign>[+-]?)\s*10\s*(?:\^|\*\*)\s*{_EXPONENT}")
_FRACTION = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)(?:\s|\\,)*)?\\frac\s*"
    rf"(?:\{{\s*(?P<top>[+-]?\s*{_DIGITS})\s*\}}|(?P<top1>\d))\s*"
    rf"(?:\{{\s*(?P<bottom>[+-]?\s*{_DIGITS})\s*\}}|(?P<bottom1>\d))"
)
_SLASH = re.compile(rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)\s+)?(?P<top>{_DIGITS})\s*/\s*(?P<bottom>[+-]?{_DIGITS})")
_SEPARATORS = re.compile(r"[,\s]|\\,")


@dataclass(frozen=True, kw_only=True)
class Number:
    """An exact value; ``decimal`` says that it was written with a point or an exponent and is not an integer."""

    value: Fraction
    decimal: bool = False


def parse_number(text: str) -> Number | None:
    """The literal that ``text`` is, or None."""
    text = text.strip()
    while text.startswith("{") and text.endswith("}") and "{" not in text[1:]:
        text = text[1:-1].strip()
    if not any(character.isdigit() for character in text[:64]):
        return None
    for pattern, read in ((_DECIMAL, _decimal), (_POWER_OF_TEN, _power), (_FRACTION, _fraction), (_SLASH, _fraction)):
        found = pattern.fullmatch(text)
        if found:
            return read(found)
    return None


def _integer(text: str) -> int:
    return int(_SEPARATORS.sub("", text))


def _signed(found: re.Match[str], value: Fraction) -> Fraction:
    return -value if found["sign"] == "-" else value


def _decimal(found: re.Match[str]) -> Number | None:
    part, repeat = found["part"] or "", found["repeat"] or found["one"] or ""
    if not (found["whole"] or part or repeat):
        return None
    exponent = _integer(found["e"] or found["k"] or found["k1"] or "0")
    if abs(exponent) > MAX_EXPONENT:
        return None
    value = Fraction(_integer((found["whole"] or "") + part or "0"), 10 ** len(part))
    if repeat:
        value += Fraction(int(repeat), (10 ** len(repeat) - 1) * 10 ** len(part))
    value *= Fraction(10) ** exponent
    return Number(value=_signed(found, value), decimal=value.denominator != 1 and not repeat)


def _power(found: re.Match[str]) -> Number | None:
    exponent = _integer(found["k"] or found["k1"])
    return Number(value=_signed(found, Fraction(10) ** exponent)) if abs(exponent) <= MAX_EXPONENT else None


def _fraction(found: re.Match[str]) -> Number | None:
    named = found.groupdict()
    bottom = _integer(named["bottom"] or named["bottom1"])
    if bottom == 0:
        return None
    value = Fraction(_integer(named["top"] or named["top1"]), bottom)
    if named["whole"]:
        if value < 0:
            return None
        value += int(named["whole"])
    return Number(value=_signed(found, value))


def close(gold: Fraction, answer: Fraction) -> bool:
    """``|a - b| <= 1e-6 max(|a|, |b|)``; for a gold of zero, ``|answer| <= 1e-12``. Zero is not a tiny gold."""
    if gold == 0:
        return abs(answer) <= ZERO_TOLERANCE
    return abs(gold - answer) <= RELATIVE_TOLERANCE * max(abs(gold), abs(answer))


def same_number(gold: Number, answer: Number) -> bool:
    """Exact equality; where one of the two is a decimal, equality to six places."""
    return gold.value == answer.value or ((gold.decimal or answer.decimal) and close(gold.value, answer.value))
