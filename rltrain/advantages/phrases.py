"""Which tokens of a completion lie in listed phrases: matched in the text, placed by decoding prefixes of the ids."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def compiled(phrases: Sequence[str], *, ignore_case: bool = True) -> re.Pattern[str]:
    """Any of the phrases as whole words; a space in a phrase matches any white space."""
    words = [r"\s+".join(map(re.escape, phrase.split())) for phrase in sorted(phrases, key=len, reverse=True)]
    return re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.IGNORECASE if ignore_case else 0)


class _Places:
    """Characters of the whole text that the first t tokens have settled, for t in 0..T, as a lazy sequence.

    The text of a prefix is decoded from its ids, and nothing is tokenized again. Where a token ends inside a character
    (bytes of it), the character is settled by the token that completes it.
    """

    def __init__(self, tokenizer: Any, ids: Sequence[int], text: str) -> None:
        self._tokenizer, self._ids, self._text = tokenizer, ids, text

    def __len__(self) -> int:
        return len(self._ids) + 1

    def __getitem__(self, t: int) -> int:
        prefix = decode(self._tokenizer, self._ids[:t])
        if self._text.startswith(prefix):
            return len(prefix)
        return next(i for i, (left, right) in enumerate(zip(prefix, self._text + "\0", strict=False)) if left != right)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of the ids, special tokens included, as it stands."""
    (text,) = tokenizer.batch_decode([list(ids)], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def in_phrases(tokenizer: Any, ids: Sequence[int], pattern: re.Pattern[str]) -> Tensor:
    """Whether each token holds a character, or a part of one, of a match; bool, shape [T].

    A token that straddles the border of a phrase is inside. Two prefixes are searched for per match, by bisection.
    """
    inside_T = torch.zeros(len(ids), dtype=torch.bool)
    text = decode(tokenizer, ids)
    places = _Places(tokenizer, ids, text)
    for match in pattern.finditer(text):
        first = bisect_left(places, match.start())  # the first prefix that reaches the phrase
        begins_here = places[first] == match.start()
        last = bisect_left(places, match.end())
        inside_T[first if begins_here else first - 1 : last] = True
    return inside_T
