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

MIN_SIGNIFICANT = 6
MAX_CONTINUED = 48

_DIGITS = r"(?:\d{1,3}(?:(?:,|\\,)\d{3})+|\d+)"
_EXPONENT = r"(?:\{\s*(?P<k>[+-]?\s*\d+)\s*\}|\(?(?P<k1>[+-]?\d+)\)?)"
_DECIMAL = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<whole>{_DIGITS})?"
    r"(?:\.(?P<part>\d*)(?:\\overline\s*(?:\{(?P<repeat>\d+)\}|(?P<one>\d))|\((?P<brackets>\d+)\)|(?P<cut>\s*\\ldots))?)?"
    rf"(?:[eE](?P<e>[+-]?\d+)|\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*{_EXPONENT})?"
)
_POWER_OF_TEN = re.compile(rf"(?P<sign>[+-]?)\s*10\s*(?:\^|\*\*)\s*{_EXPONENT}")
_FRACTION = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)(?:\s|\\,)*)?\\frac\s*"
    rf"(?:\{{\s*(?P<top>[+-]?\s*{_DIGITS})\s*\}}|(?P<top1>\d))\s*"
    rf"(?:\{{\s*(?P<bottom>[+-]?\s*{_DIGITS})\s*\}}|(?P<bottom1>\d))"
)
_SLASH = re.compile(rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)\s+)?(?P<top>{_DIGITS})\s*/\s*(?P<bottom>[+-]?{_DIGITS})")
_DOTS = re.compile(r"[+-]?\d{1,3}(?:\.\d{3}){2,}")  # 1.234.567, which can mean nothing else
_SEPARATORS = re.compile(r"[,\s]|\\,")
_DOTTED = [
    (re.compile(r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?"), r"\\overline{\1\2\3}"),
    (re.compile(r"\\(?:dot|bar)\s*\{?(\d+)\}?"), r"\\overline{\1}"),
]
_PERIOD = re.compile(r"(?P<part>\d*?)(?P<repeat>\d+?)(?P=repeat)+")


@dataclass(frozen=True, kw_only=True)
class Number:
    """An exact value; ``decimal`` says that it was written with a point or an exponent and is not an integer.

    Then ``ulp`` is the value of its last digit and ``significant`` the count of its digits without leading zeros.
    """

    value: Fraction
    decimal: bool = False
    ulp: Fraction = Fraction(0)
    significant: int = 0


def parse_number(text: str) -> Number | None:
    """The literal that ``text`` is, or None."""
    text = text.strip()
    while text.startswith("{") and text.endswith("}") and "{" not in text[1:]:
        text = text[1:-1].strip()
    if not any(character.isdigit() for character in text[:64]):
        return None
    if "\\dot" in text or "\\bar" in text:
        for pattern, replacement in _DOTTED:
            text = pattern.sub(replacement, text)
    if _DOTS.fullmatch(text):
        text = text.replace(".", "")
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
    part, repeat = found["part"] or "", found["repeat"] or found["one"] or found["brackets"] or ""
    if found["cut"]:
        part, repeat = _continued(part)
    if not (found["whole"] or part or repeat):
        return None
    exponent = _integer(found["e"] or found["k"] or found["k1"] or "0")
    if abs(exponent) > MAX_EXPONENT:
        return None
    digits = _SEPARATORS.sub("", found["whole"] or "") + part
    value = Fraction(int(digits or "0"), 10 ** len(part))
    if repeat:
        value += Fraction(int(repeat), (10 ** len(repeat) - 1) * 10 ** len(part))
    value *= Fraction(10) ** exponent
    if value.denominator == 1 or repeat:
        return Number(value=_signed(found, value))
    ulp = Fraction(10) ** (exponent - len(part))
    return Number(value=_signed(found, value), decimal=True, ulp=ulp, significant=len(digits.lstrip("0")))


def _continued(part: str) -> tuple[str, str]:
    """``0.1666…`` as ``("1", "6")``: the digits before the period and the period, which must stand there twice."""
    found = _PERIOD.fullmatch(part) if len(part) <= MAX_CONTINUED else None
    return (found["part"], found["repeat"]) if found else (part, "")


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


def rounds_to(exact: Fraction, decimal: Number) -> bool:
    """Is ``decimal`` the value rounded to its last digit?"""
    return decimal.decimal and 2 * abs(exact - decimal.value) <= decimal.ulp


def same_number(gold: Number, answer: Number) -> bool:
    """Exact equality; where one of the two is a decimal, equality to six places.

    A whole gold is a count: a decimal answer must be nearer than 1e-6, however large it is. An exact value and its
    correct rounding to at least six significant digits are the same.
    """
    if gold.value == answer.value:
        return True
    if gold.value.denominator == 1 and gold.value and abs(gold.value - answer.value) >= RELATIVE_TOLERANCE:
        return False
    if (gold.decimal or answer.decimal) and close(gold.value, answer.value):
        return True
    exact, decimal = (gold, answer) if answer.decimal else (answer, gold)
    return not exact.decimal and decimal.significant >= MIN_SIGNIFICANT and rounds_to(exact.value, decimal)
