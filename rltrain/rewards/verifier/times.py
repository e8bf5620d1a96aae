r"""Clock times and ratios: both are numbers between colons, told apart where two of them are compared."""

from __future__ import annotations

from rltrain.rewards.verifier.structure import Clock, Ratio, Structure
from rltrain.rewards.verifier.unit import Quantity
from rltrain.rewards.verifier.values import Outcome, every, expressions, of, quantities


def times_or_ratios(gold: Structure, answer: Structure) -> Outcome:
    """Two clock times, two ratios, or a ratio and its quotient."""
    if isinstance(gold, Clock) and isinstance(answer, Clock):
        return _clocks(gold, answer)
    terms = [_terms(structure) for structure in (gold, answer)]
    if not terms[0] or not terms[1]:
        return Outcome.WRONG
    if len(terms[0]) != len(terms[1]):
        quotients = [_quotient(side) for side in terms]
        return quantities(Quantity(quotients[0]), Quantity(quotients[1])) if all(quotients) else Outcome.WRONG
    cross = zip(terms[0][1:], terms[1][1:], strict=True)
    return every([expressions(f"({a})({terms[1][0]})", f"({terms[0][0]})({b})") for a, b in cross])


def _terms(structure: Structure) -> tuple[str, ...]:
    """The terms of a ratio; a quantity is a ratio of one term."""
    match structure:
        case Ratio():
            return structure.terms
        case Clock(numbers=(hours, minutes, 0), half=""):
            return (str(hours), str(minutes))
        case Quantity(unit=""):
            return (structure.text,)
    return ()


def _quotient(terms: tuple[str, ...]) -> str:
    if len(terms) == 2:
        return rf"\frac{{{terms[0]}}}{{{terms[1]}}}"
    return terms[0] if len(terms) == 1 else ""


def _clocks(gold: Clock, answer: Clock) -> Outcome:
    """The same time; "8:34 PM" is 20:34, and a half of the day may be left out."""
    if gold.half and answer.half:
        return of(_of_day(gold) == _of_day(answer))
    times = {_of_day(gold), gold.numbers}
    return of(bool(times & {_of_day(answer), answer.numbers}))


def _of_day(clock: Clock) -> tuple[int, int, int]:
    hours, minutes, seconds = clock.numbers
    if clock.half and hours <= 12:
        hours = hours % 12 + (12 if clock.half == "pm" else 0)
    return hours, minutes, seconds
