"""What an estimator asks a rollout engine when it wants to know the policy's answer in mid-completion."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ProbeRequest:
    """One completion and the cuts to probe it at: cut c keeps the prompt and the first c completion tokens.

    ``occurrence`` is that of the problem in the step, as in ``Prompt``.
    """

    problem_id: str
    sample_index: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    cuts: tuple[int, ...]
    answer_ids: tuple[int, ...]
    occurrence: int = 0

    def __post_init__(self) -> None:
        if not self.answer_ids:
            raise ValueError(f"problem {self.problem_id}: its answer has no tokens; probes need a reference answer")
        if any(not 0 < cut <= len(self.completion_ids) for cut in self.cuts):
            raise ValueError(f"problem {self.problem_id}: cuts {self.cuts} leave 1..{len(self.completion_ids)}")


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """``suffix_ids`` follow every cut and must open one brace; continuations run until it closes.

    ``tokens_per_pass`` bounds what one forward pass holds, cached tokens included; a single completion may exceed it.
    """

    seed: int
    step: int
    suffix_ids: tuple[int, ...]
    continuations: int = 5
    max_tokens: int = 10
    temperature: float = 0.6
    tokens_per_pass: int = 16384


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Per cut, float64 in [0, 1]: teacher-forced accuracy of the reference answer, and confidence."""

    accuracy_K: Tensor
    confidence_K: Tensor


@functools.lru_cache(maxsize=4)
def vocabulary(tokenizer: Any) -> tuple[str, ...]:
    """The text of every id by itself, special tokens included."""
    ids = [[index] for index in range(len(tokenizer))]
    return tuple(tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
