"""What an estimator asks a rollout engine when it wants completions continued from inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rltrain.rollout.stopping import StopRule
    from rltrain.types import Completion, Problem, Turn


@dataclass(frozen=True, kw_only=True)
class ContinuationSampling:
    """The distribution to continue with, in place of the run's own sampling (``SamplingConfig``)."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0):
            raise ValueError(f"{self}: temperature >= 0, 0 < top_p <= 1 and top_k >= 0 (0: all) are allowed")


@dataclass(frozen=True, kw_only=True)
class OneTurn:
    """A request for the rest of one turn, by :mod:`rltrain.rollout.turns`: it ends by ``rule``.

    The draw has the 64-bit ``key``, and its first token the ``position`` among those of that key.
    """

    key: int
    rule: StopRule
    position: int


@dataclass(frozen=True, kw_only=True)
class ContinuationRequest:
    """A state inside a completion: its prompt and its first ids (none: the state before the first of them).

    ``draws`` continuations of up to ``max_new_tokens`` tokens each are wanted. The draws are a function of the run's
    seed, the step, problem, occurrence, ``sample_index``, position and number of the draw, and of nothing else.

    Where an environment answers, ``problem`` and the ``turns`` of the whole completion let it answer again what lies
    before the state, which is followed by an id that the model wrote.
    """

    problem_id: str
    sample_index: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    draws: int
    max_new_tokens: int
    occurrence: int = 0
    sampling: ContinuationSampling | None = None
    problem: Problem | None = None
    turns: tuple[Turn, ...] = ()
    one_turn: OneTurn | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(f"ContinuationRequest of problem {self.problem_id}: its prompt has no tokens")
        if self.draws < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"ContinuationRequest of problem {self.problem_id}: draws={self.draws} and max_new_tokens="
                f"{self.max_new_tokens} must be >= 1"
            )

    @property
    def position(self) -> int:
        """How many completion tokens lie before the state."""
        return len(self.completion_ids)

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The state's whole sequence."""
        return self.prompt_ids + self.completion_ids


class Continuing(Protocol):
    """What an engine does for ``Need.CONTINUATIONS``."""

    def continue_(self, requests: Sequence[ContinuationRequest], *, step: int) -> list[list[Completion]]:
        """``draws`` completions per request, in order. All ranks call this together, also without a request."""
        ...
