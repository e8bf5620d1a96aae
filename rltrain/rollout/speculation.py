"""Guesses of a completion's next tokens, from what its group has written (prompt lookup decoding, Saxena 2023).

A guess costs a lookup. The decoder feeds it behind the last token, and a token is sampled at every place with that
place's own uniform number (:mod:`rltrain.rollout.sampling`). Those whose whole past was guessed right are the tokens
that would have been sampled one by one; the first always is. So a wrong guess costs time and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LONGEST = 3
"""Tokens that a place must have in common with the end of a completion, at best; else fewer."""


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


def accepted(fed_BT: Tensor, sampled_BT: Tensor) -> Tensor:
    """How many of the sampled tokens hold, [B] in 1..T: up to the first that differs from what was fed after it."""
    right_BT = (sampled_BT[:, :-1] == fed_BT[:, 1:]).long()
    return 1 + right_BT.cumprod(1).sum(1) if right_BT.shape[1] else torch.ones_like(fed_BT[:, 0])
