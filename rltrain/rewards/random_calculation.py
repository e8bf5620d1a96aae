r"""RandomCalculation's rewards: how near the boxed number is to the reference, or whether it is the reference."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from rltrain.config import RewardConfig
from rltrain.data.boxed import last_boxed
from rltrain.errors import require
from rltrain.registry import register
from rltrain.rewards.format import opens_thinking
from rltrain.rewards.verifier.extract import OPEN_THINK, after_thinking
from rltrain.types import Context, Group, Mean, Problem, Scores

MAX_LITERAL_CHARACTERS = 512
MAX_EXPONENT = 400
_DIGITS = r"[0-9]+"
_LITERAL = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<mantissa>{_DIGITS}\.?[0-9]*|\.{_DIGITS})"
    rf"(?:[eE](?P<e>[-+]?{_DIGITS})|\s*(?:\\times|\\cdot)\s*10\^(?:\{{\s*(?P<braced>[-+]?{_DIGITS})\s*\}}|(?P<bare>[0-9])))?"
)
_FRACTION = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:\\[dt]?frac\s*\{{\s*(?P<over>[-+]?{_DIGITS})\s*\}}\s*\{{\s*(?P<under>{_DIGITS})\s*\}}"
    rf"|(?P<p>{_DIGITS})\s*/\s*(?P<q>{_DIGITS}))"
)

_THOUSANDS = re.compile(r"(?<=\d)(?:,\\!\s*|\\!,|\{,\}|\\,|,)(?=\d{3}(?!\d))")


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def parse_literal(text: str, *, reduced: bool = False) -> Fraction | None:
    r"""The exact value of a numeric literal or of one simple fraction of integers. None for anything else.

    A literal is a sign, digits with at most one point, and an exponent (``e-6`` or ``\times 10^{-6}``). No arithmetic
    is done for the writer: an expression with operators is not a number. ``reduced=True`` also refuses a fraction that
    is not in lowest terms or whose denominator is 1, since ``8/4`` may be the question itself. Literals longer than
    512 characters, or with exponents beyond 400, count as none.
    """
    text = text.strip().strip("$").strip().replace("\u2212", "-")
    if len(text) > MAX_LITERAL_CHARACTERS:
        return None
    if match := _LITERAL.fullmatch(text):
        exponent = int(match["e"] or match["braced"] or match["bare"] or 0)
        if abs(exponent) > MAX_EXPONENT:
            return None
        return _signed(match["sign"], Fraction(match["mantissa"]) * Fraction(10) ** exponent)
    if match := _FRACTION.fullmatch(text):
        over, under = int(match["over"] or match["p"]), int(match["under"] or match["q"])
        if under == 0 or (reduced and (math.gcd(over, under) != 1 or under == 1)):
            return None
        return _signed(match["sign"], Fraction(over, under))
    return None


def _number(value: Any) -> float | Fraction | None:
    """A finite number given as number or literal. None for anything else."""
    if isinstance(value, str):
        return parse_literal(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, Fraction)):
        return None
    return value if not isinstance(value, float) or math.isfinite(value) else None


def continuous_reward(answer: Any, reference: Any) -> float:
    r"""``r(a, b) = 1 - min(|a-b|, 1)/2 - min(|a-b|/(|b|+1e-6), 1)/2`` (arXiv 2507.10532), in [0, 1].

    ``answer`` and ``reference`` are numbers or numeric literals (:func:`parse_literal`). 0 for no answer (None), NaN,
    infinity, or anything but a number. Never raises on an answer. ValueError if the reference is not a finite number.
    """
    a, b = _number(answer), _number(reference)
    if b is None:
        raise ValueError(f"continuous_reward: reference {reference!r} is not a finite number")
    if a is None:
        return 0.0
    # Exact first: a difference of huge integers or long decimals must neither overflow nor cancel.
    difference = abs(Fraction(a) - Fraction(b))
    absolute = float(min(difference, 1))
    relative = float(min(difference / (abs(Fraction(b)) + Fraction(1, 10**6)), 1))
    return 1.0 - 0.5 * absolute - 0.5 * relative


@dataclass(kw_only=True)
class RandomCalculationRewardConfig(RewardConfig):
    """``kind``: continuous (:func:`continuous_reward`) or exact (1 for the reference itself, else 0).

    ``relative_tolerance`` is that of the metric ``accuracy`` under ``kind=continuous``.
    """

    kind: str = "continuous"
    relative_tolerance: float = 1e-3

    def __post_init__(self) -> None:
        require(self.kind in ("continuous", "exact"), f"reward.kind={self.kind}: unknown; set continuous or exact")
        require(
            0 <= self.relative_tolerance < 1,
            f"reward.relative_tolerance={self.relative_tolerance}: must lie in [0, 1)",
        )


def reference_of(problem: Problem) -> Fraction | None:
    """The exact reference (``meta["exact"]``, else ``answer``), or None if it is no number."""
    return parse_literal(str(problem.meta.get("exact", problem.answer)))


def boxed_number(text: str, *, reduced: bool = False) -> Fraction | None:
    r"""The number in the last box after the thinking, None if there is none; ``1,234`` and ``1{,}234`` are 1234."""
    answer, _ = after_thinking(text)
    boxed = None if answer is None else last_boxed(answer)
    return None if boxed is None else parse_literal(_THOUSANDS.sub("", boxed), reduced=reduced)


@register("reward", "random_calculation", RandomCalculationRewardConfig)
def random_calculation(groups: Sequence[Group], config: RandomCalculationRewardConfig, context: Context) -> Scores:
    r"""Score the last ``\boxed{}`` after the thinking; abstain where the problem has no numeric reference.

    Metrics: ``accuracy`` (the reference itself, or within the relative tolerance if continuous) and ``answered`` (the
    share with a number in the box). An exact reward takes fractions in lowest terms only.
    """
    is_exact = config.kind == "exact"
    scores: list[list[float | None]] = []
    right: list[list[bool]] = []
    judged: list[bool] = []
    answered: list[bool] = []
    for group in groups:
        reference = reference_of(group.prompt.problem)
        if reference is None:
            scores.append([None] * len(group.completions))
            right.append([False] * len(group.completions))
            continue
        prefix = OPEN_THINK if opens_thinking(group.prompt, context.tokenizer) else ""
        numbers = [boxed_number(prefix + completion.text, reduced=is_exact) for completion in group.completions]
        tolerance = 0 if is_exact else Fraction(config.relative_tolerance) * abs(reference)
        hits = [number is not None and abs(number - reference) <= tolerance for number in numbers]
        scores.append(
            [
                float(hit) if is_exact else continuous_reward(number, reference)
                for number, hit in zip(numbers, hits, strict=True)
            ]
        )
        right.append(hits)
        judged += hits
        answered += [number is not None for number in numbers]
    metrics = {"accuracy": Mean.of(judged), "answered": Mean.of(answered)}
    return Scores(scores=scores, right=right, metrics=metrics)
