"""The completions in flight and the prompts that they continue, for :mod:`rltrain.rollout.local`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rltrain.rollout.stopping import StopRule
from rltrain.types import Completion


@dataclass(kw_only=True, slots=True)
class Row:
    """One completion while it is sampled."""

    key: int
    rule: StopRule
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[tuple[float, float]] | None = None  # H and collision by token; None: not wanted
    done: bool = False

    def completion(self) -> Completion:
        """The record of it, once it is done."""
        made = self.rule.completion(self.token_ids, self.logprobs)
        return made if self.entropies is None else replace(made, entropies=tuple(self.entropies))

    def extend(self, token_ids: Sequence[int], facts: Sequence[Sequence[float]]) -> None:
        """Append tokens and their facts, log-prob and where wanted entropy and collision, and cut where it ends."""
        if self.done:
            return
        start = len(self.token_ids)
        self.token_ids += token_ids
        self.logprobs += [logprob for logprob, *_ in facts]
        if self.entropies is not None:
            self.entropies += [(entropy, collision) for _, entropy, collision in facts]
        end = self.rule.end(self.token_ids, start)
        if end is not None:
            del self.token_ids[end:], self.logprobs[end:]
            if self.entropies is not None:
                del self.entropies[end:]
            self.done = True

    @property
    def left_tokens(self) -> int:
        """How many more tokens it may have."""
        return self.rule.max_new_tokens - len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A prompt and the rows that continue it."""

    prompt_ids: Sequence[int]
    rows: Sequence[Row]

    @property
    def prefix_ids(self) -> Sequence[int]:
        """What is prefilled: the prompt and, of a row that was sent back, its tokens."""
        token_ids = self.rows[0].token_ids
        return [*self.prompt_ids, *token_ids] if token_ids else self.prompt_ids
