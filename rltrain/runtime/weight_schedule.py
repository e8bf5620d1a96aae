"""A number that may change over the steps of a run, from its plain form in the config."""

from __future__ import annotations

import bisect
import math
from typing import Any

from rltrain.errors import ConfigError, require

EXAMPLE = "set a number, or {linear: [[0, 0.0], [100, 0.5]]}, or {steps: [[0, 1.0], [50, 0.1]]}"
KINDS = ("linear", "steps")


def is_schedule(value: Any) -> bool:
    """Whether a checked value is a schedule, not a number."""
    return isinstance(value, dict)


def check(key: str, value: Any) -> None:
    """``ConfigError`` unless ``value`` is a finite number or ``{KIND: [[step, number], …]}``, steps from 0 up."""
    if not is_schedule(value):
        require(_is_number(value), f"{key}={value}: is no number and no schedule; {EXAMPLE}")
        require(math.isfinite(value), f"{key}={value}: must be finite; 1.0 is usual")
        return
    require(len(value) == 1 and set(value) <= set(KINDS), f"{key}={value}: a schedule is linear or steps; {EXAMPLE}")
    ((kind, points),) = value.items()
    pairs = isinstance(points, list) and all(isinstance(point, list) and len(point) == 2 for point in points)
    require(pairs and bool(points), f"{key}.{kind}={points}: is no list of [step, number]; {EXAMPLE}")
    for step, number in points:
        require(
            isinstance(step, int) and not isinstance(step, bool) and step >= 0,
            f"{key}.{kind}: {step} is no step; give whole numbers from 0",
        )
        require(_is_number(number) and math.isfinite(number), f"{key}.{kind}: {number} at step {step} is not finite")
    steps = [step for step, _ in points]
    require(steps == sorted(set(steps)), f"{key}.{kind}: the steps {steps} do not rise; list each once, in order")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def value_at(value: Any, step: int) -> float:
    """The number at ``step``, steps counted from 0.

    ``linear`` runs straight from point to point: w_i + (w_{i+1} - w_i)·(s - s_i)/(s_{i+1} - s_i). ``steps`` keeps the
    number of the last point at or before the step. Before the first point both are its number, after the last its.
    """
    if not is_schedule(value):
        return float(value)
    ((kind, points),) = value.items()
    after = bisect.bisect_right([at for at, _ in points], step)
    if after == 0:
        return float(points[0][1])
    (begin, low), (end, high) = points[after - 1], points[min(after, len(points) - 1)]
    if kind == "steps" or begin == end:
        return float(low)
    if kind == "linear":
        return low + (high - low) * (step - begin) / (end - begin)
    raise ConfigError(f"{kind}: no schedule; {EXAMPLE}")
