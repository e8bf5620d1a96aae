"""What the policy is asked: problems, and their prompts as token ids."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]  # role, content (text), and what else the chat template reads


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One task: ``prompt`` is text or chat messages, ``answer`` the gold, ``meta`` whatever a reward reads."""

    id: str
    prompt: str | Sequence[Message]
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A problem as the token ids the policy is fed; ``continuation_ids`` follow them in the problem's own text.

    No token ids: the problem cannot be asked, and is left out. ``occurrence`` is how often the step drew the same
    problem before, over all ranks and sampling attempts.
    """

    problem: Problem
    token_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...] = ()
    occurrence: int = 0


class TokenProblem(Problem, abc.ABC):
    """A problem that makes its own prompt, because it is cut or joined in token ids."""

    @abc.abstractmethod
    def encode(self, tokenizer: Any, render: Callable[[str], tuple[int, ...]]) -> Prompt:
        """``render`` gives the ids of a text as a prompt, through the chat template where the model has one."""
