"""What the estimators of turns share: which completions have turns, and a turn's credit on its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rltrain.config import RunConfig
from rltrain.errors import RunError, require
from rltrain.types import Completion, Group, Turn


def turns_of(group: Group, name: str) -> list[tuple[Turn, ...]]:
    """The turns of every completion. ``RunError`` for a completion with tokens and without turns."""
    for index, completion in enumerate(group.completions):
        if completion.token_ids and not completion.turns:
            raise RunError(
                f"advantage={name}: completion {index} of problem {group.prompt.problem.id} has no turns to credit; "
                "choose an environment, or advantage=group"
            )
    return [completion.turns for completion in group.completions]


def on_tokens(credit_K: Tensor, completion: Completion) -> Tensor:
    """A turn's credit on each token that it wrote, and 0 on those of an environment, [T]."""
    pieces = [
        piece_T
        for credit, turn in zip(credit_K, completion.turns, strict=True)
        for piece_T in (credit.expand(turn.written), torch.zeros(turn.observed, dtype=credit_K.dtype))
    ]
    return torch.cat([torch.zeros(0, dtype=credit_K.dtype), *pieces])


def sums_of_rewards(turns: Sequence[Sequence[Turn]]) -> Tensor:
    """The sum of ``Turn.reward`` over each completion's turns, float64 [G]."""
    return torch.tensor([sum(turn.reward for turn in row) for row in turns], dtype=torch.float64)


def require_environment(run: RunConfig, name: str) -> None:
    """``ConfigError`` for a run without an environment, whose completions have no turns."""
    require(
        run.environment is not None,
        f"advantage={name}: credits the turns of a completion, and environment=none makes no turns; set environment, "
        "or advantage=group",
    )
