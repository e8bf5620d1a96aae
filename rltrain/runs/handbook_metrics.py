"""What a handbook's entries cost in the prompts."""

from __future__ import annotations

from collections.abc import Sequence

from rltrain.types import AdvisedProblem, Group, Mean


def handbook_metrics(groups: Sequence[Group]) -> dict[str, Mean]:
    """``handbook/tokens``: what the entries add to a prompt, on average over the groups of data with a handbook.

    ``handbook/entries``: their mean number. Nothing where no group has a handbook.
    """
    advised = [(group.prompt, group.prompt.problem) for group in groups]
    pairs = [(prompt, problem) for prompt, problem in advised if isinstance(problem, AdvisedProblem)]
    if not pairs:
        return {}
    return {
        "handbook/tokens": Mean.of([prompt.handbook_tokens for prompt, _ in pairs]),
        "handbook/entries": Mean.of([len(problem.behaviours) for _, problem in pairs]),
    }
