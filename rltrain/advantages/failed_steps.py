"""Failed steps: those on a branch that was given up, read from step potentials without a judge (arXiv 2509.19284)."""

from __future__ import annotations

from collections.abc import Sequence


def failed_steps(potentials: Sequence[float]) -> list[bool]:
    """Of each step, whether it lies strictly between a local peak and the next potential that is equal or higher.

    A local peak is a potential that is not below the one before it and above the one after it. A peak that is never
    reached again has no failed steps behind it: the completion went on from there.
    """
    count = len(potentials)
    failed = [False] * count
    for peak in range(count - 1):
        falls = potentials[peak + 1] < potentials[peak]
        if not falls or (peak and potentials[peak - 1] > potentials[peak]):
            continue
        recovered = next((k for k in range(peak + 1, count) if potentials[k] >= potentials[peak]), peak + 1)
        failed[peak + 1 : recovered] = [True] * (recovered - peak - 1)
    return failed


def failed_step_fraction(potentials: Sequence[float]) -> float:
    """The share of failed steps; 0 without a step."""
    return sum(failed_steps(potentials)) / max(1, len(potentials))
