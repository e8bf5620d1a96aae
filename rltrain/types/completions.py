"""What the policy wrote: completions, and the group of those of one prompt."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from rltrain.errors import RunError
from rltrain.types.problems import Prompt
from rltrain.types.turns import Turn, turns_before, written_mask

if TYPE_CHECKING:
    from torch import Tensor

Finish = Literal["stop", "length"]
# What a part wants kept with the samples of a group: by name, one list per completion.
Notes = Mapping[str, Sequence[Sequence[float | str]]]


@dataclass(frozen=True, kw_only=True)
class UnknownLogprobs(Sequence[float]):
    """In place of sampled log-probs that nobody kept: reading any of them, or their number, is a ``RunError``."""

    reason: str

    def _refuse(self) -> NoReturn:
        raise RunError(f"Completion.logprobs: unknown, {self.reason}; what reads sampled log-probs cannot run here")

    def __len__(self) -> int:
        self._refuse()

    def __getitem__(self, index: Any) -> Any:
        self._refuse()

    def __array__(self, *arguments: Any, **options: Any) -> Any:  # NumPy takes an object that has no length as a scalar
        self._refuse()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Ids after a prompt, EOS included, and the fp32 log-probs of the distribution that they were sampled from.

    Without ``turns`` the model wrote all of them, and ``text`` is the decoded completion without special tokens at its
    end. With ``turns`` an environment answered the model: the ids are those of the turns, one after the other. Observed
    ids carry no loss, and their log-probs and entropies are NaN. ``text`` is then that of the last turn, so that a
    reward judges what the model wrote at the end. ``transcript`` is the whole conversation. Ids are never made from
    texts. ``failed`` is "", or the failure of the environment that ended the completion, whose ``text`` is then "".
    ``abstains``: no reward judges it, and it leaves its group's statistics.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | UnknownLogprobs
    finish: Finish
    text: str = ""
    entropies: tuple[tuple[float, float], ...] | None = None  # H and collision by token, where the sampler kept them
    turns: tuple[Turn, ...] = ()
    failed: str = ""
    abstains: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.logprobs, UnknownLogprobs) and len(self.token_ids) != len(self.logprobs):
            raise ValueError(
                f"Completion: {len(self.token_ids)} token ids but {len(self.logprobs)} log-probs; give one per token"
            )
        if self.turns:
            self._check_turns()

    def _check_turns(self) -> None:
        mask_T = written_mask(self.turns)
        if len(mask_T) != len(self.token_ids):
            raise ValueError(
                f"Completion: turns of {len(mask_T)} ids but {len(self.token_ids)} token ids; "
                "written and observed ids of the turns add up to all ids"
            )
        if not isinstance(self.logprobs, UnknownLogprobs):
            _check_values("log-prob", self.logprobs, mask_T)
        for name, values in zip(("entropy", "collision"), zip(*self.entropies or (), strict=True), strict=False):
            _check_values(name, values, mask_T)

    @property
    def written_T(self) -> tuple[bool, ...]:
        """Per id, whether the model wrote it. The others are an environment's and carry no loss."""
        return written_mask(self.turns) if self.turns else (True,) * len(self.token_ids)

    @property
    def written_tokens(self) -> int:
        """How many ids the model wrote."""
        return sum(turn.written for turn in self.turns) if self.turns else len(self.token_ids)

    @property
    def written_spans(self) -> tuple[tuple[int, int], ...]:
        """``(start, stop)`` of the ids that the model wrote, turn by turn. A turn without such ids has no span."""
        ends = list(itertools.accumulate(turn.written + turn.observed for turn in self._all_turns))
        spans = zip(self._all_turns, [0, *ends], strict=False)
        return tuple((start, start + turn.written) for turn, start in spans if turn.written)

    @property
    def written_ids(self) -> tuple[int, ...]:
        """The ids that the model wrote."""
        return tuple(itertools.compress(self.token_ids, self.written_T)) if self.turns else self.token_ids

    @property
    def written_logprobs(self) -> tuple[float, ...] | UnknownLogprobs:
        """Their sampled log-probs."""
        if not self.turns or isinstance(self.logprobs, UnknownLogprobs):
            return self.logprobs
        return tuple(itertools.compress(self.logprobs, self.written_T))

    @property
    def transcript(self) -> str:
        """What the model wrote and read, turn by turn, without the chat template's markers."""
        return "".join(turn.text + turn.reply for turn in self.turns) if self.turns else self.text

    def continued(self, position: int, new: Completion) -> Completion:
        """The first ``position`` ids, then those of ``new``, as one completion; its text is for ``context.grade``.

        A turn that is cut within its written ids goes on as the first turn of ``new``.
        """
        before, logprobs = self.logprobs, new.logprobs
        if isinstance(before, UnknownLogprobs):
            logprobs = before
        elif not isinstance(logprobs, UnknownLogprobs):
            logprobs = before[:position] + logprobs
        return Completion(
            token_ids=self.token_ids[:position] + new.token_ids,
            logprobs=logprobs,
            finish=new.finish,
            turns=self._turns_continued(position, new),
            failed=new.failed,
            abstains=new.abstains,
        )

    @property
    def _all_turns(self) -> tuple[Turn, ...]:
        return self.turns or (Turn(written=len(self.token_ids)),)

    def _turns_continued(self, position: int, new: Completion) -> tuple[Turn, ...]:
        if not self.turns and not new.turns:
            return ()
        before, after = turns_before(self._all_turns, position), new._all_turns
        if before and not before[-1].observed:
            cut, first = before[-1], after[0]
            joined = replace(first, written=cut.written + first.written, state_key=cut.state_key or first.state_key)
            return (*before[:-1], joined, *after[1:])
        return before + after


def _check_values(name: str, values: Sequence[float], mask_T: Sequence[bool]) -> None:
    """Finite where the model wrote, NaN where it did not: what forgets the mask then computes NaN."""
    for place, (value, written) in enumerate(zip(values, mask_T, strict=True)):
        if written and not math.isfinite(value):
            raise ValueError(f"Completion: {name} {value} of id {place}, which the model wrote; it must be finite")
        if not written and not math.isnan(value):
            raise ValueError(f"Completion: {name} {value} of id {place}, which an environment wrote; give NaN")


@dataclass(frozen=True, kw_only=True)
class Group:
    """The G completions of one prompt. A NaN reward abstains: that completion leaves its group's statistics."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards_G: Tensor | None = None
    reward_parts: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Notes = field(default_factory=dict)
    right_G: Tensor | None = None

    def __post_init__(self) -> None:
        size = len(self.completions)
        named = dict(self.reward_parts) | ({} if self.rewards_G is None else {"rewards_G": self.rewards_G})
        for name, values_G in named.items():
            if tuple(values_G.shape) != (size,):
                raise ValueError(
                    f"Group {self.prompt.problem.id}: {name} has shape {tuple(values_G.shape)}, expected ({size},)"
                )

    @property
    def completion_ids(self) -> list[tuple[int, ...]]:
        return [completion.token_ids for completion in self.completions]
