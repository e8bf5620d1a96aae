"""Metrics of completions that an environment took part in."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rltrain.types import Completion, Max, Mean, Metric

TIMEOUT = "timeout"


def turn_metrics(completions: Sequence[Completion]) -> dict[str, Metric]:
    """Of completions with turns; {} where none has any, as in a run without an environment.

    ``turns/reward`` is the sum over a completion's turns, ``environment/call_ratio`` the share of completions with a
    call, ``environment/errors`` the share of replies that failed other than by their deadline.
    ``environment/latency_p99_s`` is the nearest-rank percentile of the replies' times, over ranks the largest.
    """
    taken = [completion for completion in completions if completion.turns]
    turns = [turn for completion in taken for turn in completion.turns]
    if not turns:
        return {}
    calls = [sum(turn.called for turn in completion.turns) for completion in taken]
    return {
        "turns/mean": Mean.of([len(completion.turns) for completion in taken]),
        "turns/max": Max(value=float(max(len(completion.turns) for completion in taken))),
        "turns/reward": Mean.of([sum(turn.reward for turn in completion.turns) for completion in taken]),
        "environment/calls": Mean.of(calls),
        "environment/call_ratio": Mean.of([count > 0 for count in calls]),
        "environment/errors": Mean.of([turn.failure not in ("", TIMEOUT) for turn in turns]),
        "environment/timeouts": Mean.of([turn.failure == TIMEOUT for turn in turns]),
        "environment/failed_ratio": Mean.of([bool(completion.failed) for completion in taken]),
        "environment/latency_p99_s": Max(value=percentile([turn.latency_s for turn in turns], 0.99)),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile: the smallest value with at least ``share`` of all at or below it."""
    return sorted(values)[math.ceil(share * len(values)) - 1]
