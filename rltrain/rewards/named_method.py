"""A reward for naming the right method and boxing its number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rltrain.config import RewardConfig
from rltrain.data.boxed import last_boxed
from rltrain.data.forks import METHODS
from rltrain.errors import RunError
from rltrain.registry import register
from rltrain.types import Context, Group, Mean, Problem, Scores

_METHOD = re.compile(f"[{METHODS}]")


@dataclass(kw_only=True)
class NamedMethodConfig(RewardConfig):
    """See :func:`named_method`. For ``data=forks``."""


def first_method(text: str) -> str | None:
    """The first of the letters A, B and C, or None."""
    first = _METHOD.search(text)
    return first[0] if first else None


def is_right(text: str, problem: Problem) -> float:
    """See :func:`named_method`."""
    return float(first_method(text) == problem.meta["method"] and last_boxed(text) == problem.answer)


@register("reward", "named_method", NamedMethodConfig)
def named_method(groups: Sequence[Group], config: NamedMethodConfig, context: Context) -> Scores:
    """1 if the first method of a completion is ``problem.meta["method"]`` and its last box holds the answer, else 0.

    The box is part of it so that the form is rewarded, too. Metric ``method/named``: completions that name a method.
    """
    rows = []
    for group in groups:
        problem = group.prompt.problem
        if "method" not in problem.meta:
            raise RunError(f"{problem.id}: has no right method in its meta; named_method is for data=forks")
        rows.append([is_right(completion.text, problem) for completion in group.completions])
    texts = [completion.text for group in groups for completion in group.completions]
    named = Mean.of([float(first_method(text) is not None) for text in texts])
    return Scores(scores=rows, metrics={"method/named": named})
