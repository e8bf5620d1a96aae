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
    problem before, over all ranks and sampling attempts. ``handbook_tokens`` are those that a handbook adds.
    """

    problem: Problem
    token_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...] = ()
    occurrence: int = 0
    handbook_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class AdvisedProblem(Problem):
    """A problem whose ``prompt`` shows entries of a handbook; ``bare`` is the prompt without them.

    ``behaviours`` are the entries' names, ``rows`` says where they stand. ``as_system``: they are the prompt's first
    message, which the row itself did not have.
    """

    bare: str | Sequence[Message]
    behaviours: tuple[str, ...]
    rows: str
    as_system: bool = False


def bare_prompt(problem: Problem) -> str | Sequence[Message]:
    """The prompt without a handbook's entries."""
    return problem.bare if isinstance(problem, AdvisedProblem) else problem.prompt


def user_text(prompt: str | Sequence[Message]) -> str:
    """A prompt as text. Of chat messages, those of the user, a line each."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt if message["role"] == "user")


class TokenProblem(Problem, abc.ABC):
    """A problem that makes its own prompt, because it is cut or joined in token ids."""

    @abc.abstractmethod
    def encode(self, tokenizer: Any, render: Callable[[str], tuple[int, ...]]) -> Prompt:
        """``render`` gives the ids of a text as a prompt, through the chat template where the model has one."""
