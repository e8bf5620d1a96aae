"""The completions in flight and the prompts that they continue, for :mod:`rltrain.rollout.local`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rltrain.rollout.conversation import Conversation
from rltrain.rollout.stopping import StopRule
from rltrain.types import Completion


@dataclass(kw_only=True, slots=True)
class Row:
    """One completion while it is sampled.

    With a ``conversation`` the ``rule`` is that of the present turn, whose ids begin at ``begins``, and the row is
    ``done`` while it waits for an answer, too. A row that continues a completion may draw its tokens at the positions
    behind that completion's first ``offset`` ids.
    """

    key: int
    rule: StopRule
    conversation: Conversation | None = None
    begins: int = 0
    offset: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[tuple[float, float]] | None = None  # H and collision by token; None: not wanted
    done: bool = False

    def completion(self) -> Completion:
        """The record of it, once it is done."""
        if self.conversation is not None:
            return self.conversation.completion(self.token_ids, self.logprobs, self.entropies)
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
        turn_ids = self.token_ids[self.begins :] if self.begins else self.token_ids
        end = self.rule.end(turn_ids, start - self.begins)
        if end is not None:
            self._cut(self.begins + end)
            self.done = True
            if self.conversation is not None:
                self.conversation.wrote(self.token_ids[self.begins :])

    def _cut(self, end: int) -> None:
        del self.token_ids[end:], self.logprobs[end:]
        if self.entropies is not None:
            del self.entropies[end:]

    @property
    def waits(self) -> bool:
        """Whether it goes on once its environment has answered."""
        return self.conversation is not None and self.conversation.waits

    def observe(self) -> None:
        """Take the environment's answer: ids that were not sampled, and another turn, or the end."""
        assert self.conversation is not None and self.done
        observed_ids = self.conversation.observed(self.offset + len(self.token_ids))
        if observed_ids is None:
            return
        self.token_ids += observed_ids
        self.logprobs += [math.nan] * len(observed_ids)
        if self.entropies is not None:
            self.entropies += [(math.nan, math.nan)] * len(observed_ids)
        self.begins, self.done = len(self.token_ids), False
        self.rule = self.conversation.rules.of_turn(self.offset + self.begins)

    @property
    def observed_tokens(self) -> int:
        """How many tokens before the present turn are its environment's."""
        return self.conversation.turns[-1].observed if self.conversation is not None and self.conversation.turns else 0

    @property
    def left_tokens(self) -> int:
        """How many more tokens it may have, of its present turn."""
        return self.begins + self.rule.max_new_tokens - len(self.token_ids)

    @property
    def most_tokens(self) -> int:
        """How many tokens it may have, observed ones included."""
        if self.conversation is None:
            return self.rule.max_new_tokens
        return self.conversation.rules.most_tokens - self.offset


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


class WaitingRows:
    """Rows that have ended a turn, each as a job of its own, and the decode step at which it did."""

    def __init__(self) -> None:
        self.rows: list[tuple[Job, int]] = []
        self._known: set[int] = set()

    def add(self, jobs: Sequence[Job], step: int) -> None:
        """Note the rows of jobs that began to wait."""
        for job in jobs:
            for row in job.rows:
                if row.waits and id(row) not in self._known:
                    self._known.add(id(row))
                    self.rows.append((Job(prompt_ids=job.prompt_ids, rows=[row]), step))

    def conversations(self) -> list[Conversation]:
        """Those of all rows."""
        return [row.conversation for job, _ in self.rows for row in job.rows if row.conversation is not None]

    def take_due(self, step: int, decoding: int, *, share: float, after_steps: int) -> list[Job]:
        """Take the rows that go on now: all of them where none is ``decoding``.

        Else, once those that wait are ``share`` of both, those that have waited for ``after_steps`` decode steps.
        """
        if decoding and len(self.rows) < share * (decoding + len(self.rows)):
            return []
        due = [job for job, since in self.rows if not decoding or step - since >= after_steps]
        taken = {id(row) for job in due for row in job.rows}
        self.rows = [(job, since) for job, since in self.rows if id(job.rows[0]) not in taken]
        self._known -= taken
        return due
