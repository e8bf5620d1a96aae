"""Equality of expressions by evaluation: exact where every step is rational, else at points, to 30 digits.

Bounded by construction: integers of at most 16384 bits, powers and factorials refused beyond fixed sizes. Nothing here
calls ``eval`` or a computer algebra system. Two expressions are equal if they agree at several points of both signs: a
false match of analytic functions has probability zero up to that precision, and unlike simplification it takes well
under a millisecond whatever the input.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rltrain.rewards.verifier.expression import Expression, Node
from rltrain.rewards.verifier.number import RELATIVE_TOLERANCE

MAX_BITS, MAX_FACTORIAL, MAX_EXPONENT, MAX_LOG2 = 16384, 200, 10_000, 100_000
DIGITS, AGREEMENT = 50, 30

_local = threading.local()


class TooLarge(ArithmeticError):
    """A value beyond the bounds: a digit bomb, a power tower, a factorial of a large number."""


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


def numeric(node: Node, point: Mapping[str, Any], mp: Any) -> Any:
    """The value at ``point`` as an mpmath number of 50 digits."""
    if node.kind == "number":
        return mp.mpf(node.value.numerator) / node.value.denominator
    if node.kind == "symbol":
        return point[node.value]
    if node.kind == "constant":
        return {"pi": +mp.pi, "e": +mp.e, "i": mp.mpc(0, 1)}[node.value]
    values = [numeric(child, point, mp) for child in node.children]
    result = _numeric_step(node.kind, values, mp)
    if not mp.isfinite(result) or (result and abs(mp.mag(result)) > MAX_LOG2):
        raise TooLarge(node.kind)
    return result


def _numeric_step(kind: str, values: list[Any], mp: Any) -> Any:
    a, b = values[0], values[-1]
    if kind == "power" or kind == "exp":
        base, exponent = (a, b) if kind == "power" else (mp.e, a)
        if abs(exponent) > MAX_EXPONENT or (base and abs(exponent) * abs(mp.mag(base)) > MAX_LOG2):
            raise TooLarge(kind)
        return mp.power(base, exponent)
    if kind in ("factorial", "binomial") and max(abs(value) for value in values) > 10 * MAX_FACTORIAL:
        raise TooLarge(kind)
    if kind == "root":
        real = mp.im(a) == 0 and mp.re(a) < 0 and mp.isint(b) and int(b) % 2
        return -mp.power(-a, 1 / b) if real else mp.power(a, 1 / b)
    return _NUMERIC[kind](mp, *values)


_NUMERIC: Mapping[str, Callable[..., Any]] = {
    "add": lambda mp, a, b: a + b,
    "subtract": lambda mp, a, b: a - b,
    "multiply": lambda mp, a, b: a * b,
    "divide": lambda mp, a, b: a / b,
    "negate": lambda mp, a: -a,
    "abs": lambda mp, a: abs(a),
} | {
    name: (lambda function: lambda mp, *values: getattr(mp, function)(*values))(name)
    for name in "factorial binomial sqrt floor ceil log log10 sin cos tan cot sec csc sinh cosh tanh asin acos atan "
    "asinh acosh atanh".split()
}

# Irrational-looking points of both signs and sizes, so that |x| is not x and sqrt(x^2) is not x.
_POINTS = (
    Fraction(7919, 4513),
    Fraction(-6007, 5003),
    Fraction(3001, 8009),
    Fraction(-2503, 7717),
    Fraction(9103, 1429),
)
_STEP = Fraction(1913, 3571)


def _points(symbols: frozenset[str], mp: Any) -> Iterator[dict[str, Any]]:
    for shift, start in enumerate(_POINTS):
        values = {}
        for index, name in enumerate(sorted(symbols)):
            value = start + _STEP * index * (-1) ** (index + shift)
            values[name] = mp.mpf(value.numerator) / value.denominator
        yield values


def _context() -> Any:
    """This thread's 50-digit arithmetic: mpmath changes the precision of a context while it computes."""
    if not hasattr(_local, "mp"):
        import mpmath

        _local.mp = mpmath.MPContext()
        _local.mp.dps = DIGITS
    return _local.mp


@lru_cache(maxsize=4096)
def evaluated(expression: Expression, symbols: frozenset[str]) -> tuple[Any, ...]:
    """Values at the standard points for ``symbols``; None where the expression has none."""
    values, mp = [], _context()
    for point in _points(symbols, mp):
        try:
            values.append(numeric(expression.root, point, mp))
        except (TooLarge, ZeroDivisionError, ValueError, TypeError, mp.NoConvergence):
            values.append(None)
        if not symbols:
            break
    return tuple(values)


def agree(a: Any, b: Any, *, decimal: bool) -> bool:
    """Equal to 30 digits; to the tolerance of decimals where one of them is rounded."""
    tolerance = float(RELATIVE_TOLERANCE) if decimal else 10.0**-AGREEMENT
    size = max(abs(a), abs(b))
    noise = min(abs(a), abs(b)) == 0 and size < 10.0 ** (5 - DIGITS)  # sin(pi) is 0, but 2^-200 is not 2^-201
    return abs(a - b) <= tolerance * size or noise


def same_expression(gold: Expression, answer: Expression) -> bool | None:
    """True or False; None where too few points give a value to tell."""
    symbols = gold.symbols | answer.symbols
    decimal = gold.decimal or answer.decimal
    if not symbols and not decimal:
        exact = rational(gold.root), rational(answer.root)
        if None not in exact:
            return exact[0] == exact[1]
    pairs = list(zip(evaluated(gold, symbols), evaluated(answer, symbols), strict=True))
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if any(not agree(a, b, decimal=decimal) for a, b in both):
        return False
    if any((a is None) != (b is None) for a, b in pairs):
        return None if both else False
    return True if len(both) >= min(2, len(pairs)) else None


def constant_ratio(gold: Sequence[Expression], answer: Sequence[Expression]) -> Any:
    """``(left - right) / (gold left - gold right)`` if it is the same non-zero number everywhere, else None.

    Then the two equations have the same solutions, and two inequalities if the ratio is positive.
    """
    sides = (*gold, *answer)
    symbols = frozenset[str]().union(*(side.symbols for side in sides))
    decimal = any(side.decimal for side in sides)
    ratios = []
    for a, b, c, d in zip(*(evaluated(side, symbols) for side in sides), strict=True):
        if None not in (a, b, c, d) and a != b and c != d:
            ratios.append((c - d) / (a - b))
    constant = len(ratios) >= 2 and all(agree(ratio, ratios[0], decimal=decimal) for ratio in ratios)
    return ratios[0] if constant else None
