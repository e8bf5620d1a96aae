r"""Equality of expressions by evaluation: exact where every step is rational, else at points, to 30 digits.

Bounded by construction: integers of at most 16384 bits, powers and factorials refused beyond fixed sizes. Nothing here
calls ``eval`` or a computer algebra system. Two expressions are equal if they agree at every point where both are real,
at least at ``MIN_POINTS`` of them; where ``i`` stands in one, at every point as complex numbers. Points are of both
signs, so ``\sqrt{x^2}`` is not ``x``; but ``\ln x^2`` is ``2\ln x``, because both are real for positive ``x`` only. A
symbol's value depends on its name and not on the others. Symbols that only count (in a floor, a factorial, an exponent
of -1) are integers.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import mpmath

from rltrain.rewards.verifier.expression import Expression, Node, Unparsed, parse_expression
from rltrain.rewards.verifier.number import MIN_SIGNIFICANT, RELATIVE_TOLERANCE, Number

MAX_BITS, MAX_FACTORIAL, MAX_EXPONENT, MAX_LOG2 = 16384, 200, 10_000, 100_000
DIGITS, AGREEMENT = 50, 30
MIN_POINTS = 3

_local = threading.local()


class TooLarge(ArithmeticError):
    """A value beyond the bounds: a digit bomb, a power tower, a factorial of a large number."""


class NotReal(ArithmeticError):
    """A value outside the real domain: the square root or logarithm of a negative number."""


def rational(node: Node) -> Fraction | None:
    """The exact value where every step is rational; None where one is not. ``TooLarge`` beyond ``MAX_BITS``."""
    if node.kind == "number":
        return node.value
    step = _RATIONAL.get(node.kind)
    if step is None:
        return None
    values = [rational(child) for child in node.children]
    if any(value is None for value in values):
        return None
    result = step(*values)
    if result is not None and max(result.numerator.bit_length(), result.denominator.bit_length()) > MAX_BITS:
        raise TooLarge(node.kind)
    return result


def _rational_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return None
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * size > MAX_BITS:
        if abs(base) in (0, 1) and exponent > 0:
            return base if exponent % 2 or base >= 0 else -base
        raise TooLarge("power")
    return base ** int(exponent)


def _rational_factorial(value: Fraction) -> Fraction | None:
    if value.denominator != 1 or value < 0:
        return None
    if value > MAX_FACTORIAL:
        raise TooLarge("factorial")
    return Fraction(math.factorial(int(value)))


def _rational_binomial(n: Fraction, k: Fraction) -> Fraction | None:
    if n.denominator != 1 or k.denominator != 1 or n < 0 or k < 0:
        return None
    if n > 10 * MAX_FACTORIAL:
        raise TooLarge("binomial")
    return Fraction(math.comb(int(n), int(k)))


def _rational_sqrt(value: Fraction) -> Fraction | None:
    if value < 0:
        return None
    top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
    return Fraction(top, bottom) if Fraction(top * top, bottom * bottom) == value else None


_RATIONAL: Mapping[str, Callable[..., Fraction | None]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "negate": lambda a: -a,
    "abs": lambda a: abs(a),
    "power": _rational_power,
    "factorial": _rational_factorial,
    "binomial": _rational_binomial,
    "sqrt": _rational_sqrt,
    "floor": lambda a: Fraction(a.__floor__()),
    "ceil": lambda a: Fraction(a.__ceil__()),
}


def numeric(node: Node, point: Mapping[str, Any], mp: Any, *, real: bool) -> Any:
    """The value at ``point`` as an mpmath number of 50 digits; ``real``: every step must be real, else ``NotReal``."""
    if node.kind == "number":
        return mp.mpf(node.value.numerator) / node.value.denominator
    if node.kind == "symbol":
        return point[node.value]
    if node.kind == "constant":
        if node.value == "i" and real:
            raise NotReal("i")
        return {"pi": +mp.pi, "e": +mp.e, "i": mp.mpc(0, 1)}[node.value]
    values = [numeric(child, point, mp, real=real) for child in node.children]
    result = _numeric_step(node, values, mp, real)
    if not mp.isfinite(result) or (result and abs(mp.mag(result)) > MAX_LOG2):
        raise TooLarge(node.kind)
    if real and isinstance(result, mp.mpc):
        raise NotReal(node.kind)
    return result


def _numeric_step(node: Node, values: list[Any], mp: Any, real: bool) -> Any:
    kind, a, b = node.kind, values[0], values[-1]
    if kind in ("power", "exp"):
        base, exponent = (a, b) if kind == "power" else (mp.e, a)
        if abs(exponent) > MAX_EXPONENT or (base and abs(exponent) * abs(mp.mag(base)) > MAX_LOG2):
            raise TooLarge(kind)
        if real and base < 0 and not mp.isint(exponent):
            return _odd_root(node.children[1], base, exponent, mp)
        return mp.power(base, exponent)
    if kind in ("factorial", "factorial2", "binomial") and max(abs(value) for value in values) > 10 * MAX_FACTORIAL:
        raise TooLarge(kind)
    if kind == "apply":  # some function of that name, whatever it is
        share = mp.mpf(_draw(str(node.value), "function", 0)) / 2**48
        return mp.sin(a * (1 + share)) + share * a
    if kind == "root":
        odd = mp.im(a) == 0 and mp.re(a) < 0 and mp.isint(b) and int(b) % 2
        return -mp.power(-a, 1 / b) if odd else mp.power(a, 1 / b)
    return _NUMERIC[kind](mp, *values)


def _odd_root(exponent: Node, base: Any, value: Any, mp: Any) -> Any:
    """``x^{p/q}`` of a negative ``x`` with an odd ``q``, as a real number."""
    share = rational(exponent)
    if share is None or share.denominator % 2 == 0:
        raise NotReal("power")
    size = mp.power(-base, value)
    return -size if share.numerator % 2 else size


_NUMERIC: Mapping[str, Callable[..., Any]] = {
    "add": lambda mp, a, b: a + b,
    "subtract": lambda mp, a, b: a - b,
    "multiply": lambda mp, a, b: a * b,
    "divide": lambda mp, a, b: a / b,
    "negate": lambda mp, a: -a,
    "abs": lambda mp, a: abs(a),
    "degree": lambda mp, a: a * mp.pi / 180,
    "factorial2": lambda mp, a: mp.fac2(a),
} | {
    name: (lambda function: lambda mp, *values: getattr(mp, function)(*values))(name)
    for name in "factorial binomial sqrt floor ceil log log10 sin cos tan cot sec csc sinh cosh tanh asin acos atan "
    "acot asec acsc asinh acosh atanh".split()
}

# --- points ------------------------------------------------------------------------------------------------------

# (smallest size, largest size, sign): + or - for all symbols, ~ for a sign of each symbol's own.
_REAL = ((0.6, 3.2, "+"), (0.4, 2.9, "~"), (0.07, 0.9, "+"), (0.5, 3.3, "-"), (1.7, 6.9, "~"), (0.1, 0.95, "~"))
_WIDE = ((7.0, 45.0, "+"), (3.0, 12.0, "~"), (45.0, 99.0, "+"), (5.0, 40.0, "-"), (0.01, 0.2, "~"), (300.0, 900.0, "+"))
_HUGE = ((2e3, 9e3, "+"), (2e3, 9e3, "-"), (1e5, 9e5, "~"))
_WHOLE = tuple(
    (low, high, "+") for low, high in ((1, 9), (3, 40), (4, 41), (20, 99), (1, 6), (50, 140), (2, 13), (100, 190))
)
_COUNTING = {"factorial", "factorial2", "binomial", "floor", "ceil"}
_JUMPS = {"abs", "floor", "ceil"}
_SIGNED = {"abs", "sqrt", "root"}
_COUNTERS = set("jklmnN")


@lru_cache(maxsize=65536)
def _draw(name: str, place: str, index: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{name} {place} {index}".encode(), digest_size=6).digest(), "big")


@lru_cache(maxsize=65536)
def _value(name: str, place: str, index: int, low: float, high: float, sign: str) -> Fraction:
    drawn = _draw(name, place, index)
    negative = sign == "-" or (sign == "~" and drawn >> 47)
    size: Fraction
    if place == "whole":
        size = Fraction(int(low) + drawn % (int(high) - int(low) + 1))
    else:
        share = Fraction(drawn % 100_003, 100_003)
        size = Fraction(low).limit_denominator(100) + share * Fraction(high - low).limit_denominator(100)
    return -size if negative else size


def _plan(gold: Expression, answer: Expression) -> list[Any]:
    """The points to compare at, as (place, index, range)."""
    kinds = gold.kinds | answer.kinds
    whole = [("whole", index, span) for index, span in enumerate(_WHOLE)]
    real = [("real", index, span) for index, span in enumerate(_REAL)]
    counts = kinds & {"floor", "ceil"} and gold.symbols | answer.symbols <= _COUNTERS
    if counts or "factorial2" in kinds:
        return whole
    if kinds & _JUMPS:
        real += [("huge", index, span) for index, span in enumerate(_HUGE)]
    if kinds & _SIGNED:
        real += [("sign", index, (0.5, 4.0, "~")) for index in range(6)]
    return real + whole if kinds & _COUNTING or _alternates(gold) or _alternates(answer) else real


def _alternates(expression: Expression) -> bool:
    """Does it hold a power of a negative number with a symbol above, such as ``(-1)^n``?"""
    return any(
        node.kind == "power"
        and any(inner.kind == "symbol" for inner in node.children[1].walk())
        and (base := _constant(node.children[0])) is not None
        and base < 0
        for node in expression.root.walk()
    )


def _constant(node: Node) -> Fraction | None:
    try:
        return rational(node)
    except (TooLarge, ZeroDivisionError):
        return None


def _context() -> Any:
    """This thread's 50-digit arithmetic: mpmath changes the precision of a context while it computes."""
    if not hasattr(_local, "mp"):
        _local.mp = mpmath.MPContext()
        _local.mp.dps = DIGITS
    return _local.mp


def value_at(expression: Expression, place: str, index: int, span: tuple[float, float, str], *, real: bool) -> Any:
    """The value at one standard point; None where there is none. Remembered with the expression."""
    key = (place, index, real)
    if key not in expression.values:
        mp = _context()
        try:
            point = {name: _value(name, place, index, *span) for name in expression.symbols}
            numbers = {name: mp.mpf(value.numerator) / value.denominator for name, value in point.items()}
            expression.values[key] = numeric(expression.root, numbers, mp, real=real)
        except (TooLarge, NotReal, ZeroDivisionError, ValueError, TypeError, OverflowError, mp.NoConvergence):
            expression.values[key] = None
    return expression.values[key]


# --- equality ----------------------------------------------------------------------------------------------------


def agree(a: Any, b: Any, *, decimal: bool) -> bool:
    """Equal to 30 digits; to the tolerance of decimals where one of them is rounded."""
    tolerance = float(RELATIVE_TOLERANCE) if decimal else 10.0**-AGREEMENT
    size = max(abs(a), abs(b))
    noise = min(abs(a), abs(b)) == 0 and size < 10.0 ** (5 - DIGITS)  # sin(pi) is 0, but 2^-200 is not 2^-201
    return abs(a - b) <= tolerance * size or noise


def same_expression(gold: Expression, answer: Expression) -> bool | None:
    """True or False; None where too few points give a value to tell."""
    if not gold.symbols and not answer.symbols:
        return _same_constant(gold, answer)
    if "i" not in gold.kinds | answer.kinds:
        same = _same_at(gold, answer, _plan(gold, answer), real=True, least=MIN_POINTS)
        if same is None:
            wide = [("wide", index, span) for index, span in enumerate(_WIDE)]
            same = _same_at(gold, answer, _plan(gold, answer) + wide, real=True, least=MIN_POINTS)
        if same is not None:
            return same
    real = [("real", index, span) for index, span in enumerate(_REAL)]
    return _same_at(gold, answer, real, real=False, least=2)


def _same_at(gold: Expression, answer: Expression, plan: Sequence[Any], *, real: bool, least: int) -> bool | None:
    decimal, agreed, missing = gold.decimal or answer.decimal, 0, 0
    for place, index, span in plan:
        a = value_at(gold, place, index, span, real=real)
        b = value_at(answer, place, index, span, real=real)
        if a is None or b is None:
            missing += a is not b
        elif not agree(a, b, decimal=decimal):
            return False
        else:
            agreed += 1
    if agreed < least:
        return None if real or not missing else False
    return True


def _same_constant(gold: Expression, answer: Expression) -> bool | None:
    decimal = gold.decimal or answer.decimal
    if not decimal:
        exact = rational(gold.root), rational(answer.root)
        if None not in exact:
            return exact[0] == exact[1]
    for real in (True, False):
        a, b = (value_at(side, "real", 0, _REAL[0], real=real) for side in (gold, answer))
        if a is not None and b is not None:
            return agree(a, b, decimal=decimal)
    return None if a is b else False


def rounds_constant(exact: Expression, decimal: Number, *, least: int = MIN_SIGNIFICANT) -> bool:
    """Is ``decimal`` the value of a constant rounded to its last digit, of which there are ``least`` or more?"""
    if exact.symbols or exact.decimal or not decimal.decimal or decimal.significant < least:
        return False
    value, mp = value_at(exact, "real", 0, _REAL[0], real=True), _context()
    if value is None:
        return False
    written, ulp = (mp.mpf(part.numerator) / part.denominator for part in (decimal.value, decimal.ulp))
    return bool(2 * abs(value - written) <= ulp * (1 + mp.mpf(10) ** -20))


def real_value(text: str) -> Any:
    """The value of a real constant given as text, or None."""
    try:
        expression = parse_expression(text)
    except Unparsed:
        return None
    return None if expression.symbols else value_at(expression, "real", 0, _REAL[0], real=True)


def constant_ratio(gold: Sequence[Expression], answer: Sequence[Expression]) -> Any:
    """``(left - right) / (gold left - gold right)`` if it is the same non-zero number everywhere, else None.

    Then the two equations have the same solutions, and two inequalities if the ratio is positive.
    """
    sides = (*gold, *answer)
    decimal = any(side.decimal for side in sides)
    real = not any("i" in side.kinds for side in sides)
    ratios: list[Any] = []
    for a, b, c, d in _sides_at(sides, real=real):
        if (a == b) != (c == d):
            return None
        if a != b:
            ratios.append((c - d) / (a - b))
            if not agree(ratios[-1], ratios[0], decimal=decimal):
                return None
    return ratios[0] if len(ratios) >= MIN_POINTS else None


def _sides_at(sides: Sequence[Expression], *, real: bool) -> Iterator[list[Any]]:
    for place, spans in (("real", _REAL), ("wide", _WIDE)):
        for index, span in enumerate(spans):
            values = [value_at(side, place, index, span, real=real) for side in sides]
            if None not in values:
                yield values
