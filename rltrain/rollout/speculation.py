"""Guesses of a completion's next tokens, from what its group has written (prompt lookup decoding, Saxena 2023).

Or from a table of what last followed each token in the whole batch (after token recycling, Luo et al., 2408.08696).

A guess costs a lookup. The decoder feeds it behind the last token, and a token is sampled at every place with that
place's own uniform number (:mod:`rltrain.rollout.sampling`). Those whose whole past was guessed right are the tokens
that would have been sampled one by one; the first always is. So a wrong guess costs time and changes nothing.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Sequence

import torch
from torch import Tensor

_LONGEST = 3
"""Tokens that a place must have in common with the end of a completion, at best; else fewer."""


RECYCLED = 8
"""Successors of a token that are kept."""


class GroupDrafts:
    """Guesses for the completions of one prompt; their lists of tokens are watched while they grow."""

    def __init__(self, prompt_ids: Sequence[int], completions: Sequence[list[int]]) -> None:
        self._prompt_tokens, self._completions = len(prompt_ids), completions
        self._texts = [list(prompt_ids) for _ in completions]
        self._indexed = [0] * len(completions)
        self._after: dict[tuple[int, ...], tuple[list[int], int]] = {}  # of some tokens, where they were seen last

    def guess(self, index: int, count: int) -> list[int]:
        """``count`` tokens that may follow completion ``index``, filled up with 0."""
        for other in range(len(self._texts)):
            self._read(other)
        text = self._texts[index]
        for size in range(min(_LONGEST, len(text)), 0, -1):
            if place := self._after.get(tuple(text[-size:])):
                source, start = place
                guessed = source[start : start + count]
                return guessed + [0] * (count - len(guessed))
        return [0] * count

    def _read(self, index: int) -> None:
        """Enter the places that have a token after them."""
        text = self._texts[index]
        text += self._completions[index][len(text) - self._prompt_tokens :]
        for end in range(max(self._indexed[index], 1), len(text)):
            for size in range(1, min(_LONGEST, end) + 1):
                self._after[tuple(text[end - size : end])] = (text, end)
        self._indexed[index] = len(text)


class RecycledTokens:
    """A table of the last ``RECYCLED`` successors of each token, in the prompts and completions of a batch.

    The paper's table has 8 candidates per token, too, from the logits of the last forward; its tree of guesses is here
    a chain. The table is that of one batch, so that a resumed run guesses alike.
    """

    def __init__(self) -> None:
        self._watched: list[tuple[list[int], list[int]]] = []  # what was read of a row: its last token; its tokens
        self._read: list[int] = []
        self._after: dict[int, deque[int]] = {}

    def watch(self, prompt_ids: Sequence[int], completions: Sequence[list[int]]) -> None:
        """Read a prompt, and its completions while they grow. Completions that are watched already stay so."""
        new = [completion for completion in completions if not any(completion is known for _, known in self._watched)]
        if new:
            self._enter(list(prompt_ids))
        self._watched += [(list(prompt_ids[-1:]), completion) for completion in new]
        self._read += [0] * len(new)

    def refresh(self) -> None:
        """Enter what the completions have grown by."""
        for index, (last, completion) in enumerate(self._watched):
            new = completion[self._read[index] :]
            if new:
                self._enter([*last, *new])
                last[:], self._read[index] = new[-1:], len(completion)

    def _enter(self, tokens: Sequence[int]) -> None:
        for token, successor in itertools.pairwise(tokens):
            self._after.setdefault(token, deque(maxlen=RECYCLED)).append(successor)

    def guess(self, token: int, count: int) -> list[int]:
        """A chain of ``count`` tokens behind ``token``, filled up with 0.

        Each is the most frequent of the last successors of the one before; of equally frequent ones the newest.
        """
        guessed: list[int] = []
        while len(guessed) < count and (successors := self._after.get(token)):
            times = Counter(reversed(successors))  # the newest first, which breaks ties
            token = max(times, key=times.__getitem__)
            guessed.append(token)
        return guessed + [0] * (count - len(guessed))


def accepted(fed_BT: Tensor, sampled_BT: Tensor) -> Tensor:
    """How many of the sampled tokens hold, [B] in 1..T: up to the first that differs from what was fed after it."""
    right_BT = (sampled_BT[:, :-1] == fed_BT[:, 1:]).long()
    return 1 + right_BT.cumprod(1).sum(1) if right_BT.shape[1] else torch.ones_like(fed_BT[:, 0])
