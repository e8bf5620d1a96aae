"""Where a completion ends: at a stop id, at the token that completes a stop string, or at the length limit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rltrain.config import SamplingConfig
from rltrain.types import Completion

# A character of UTF-8 has at most four bytes and a byte-level vocabulary may spend a token on each.
_TOKENS_PER_CHARACTER = 4


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """``end`` is a pure function of the ids, so it does not matter how often or how late it is asked.

    ``before`` are the last ids of what is continued: a stop string may begin in them.
    """

    stop_ids: Collection[int]
    stop_strings: Sequence[str]
    max_new_tokens: int
    tokenizer: Any
    before: tuple[int, ...] = ()

    @classmethod
    def of(cls, policy: Any, sampling: SamplingConfig) -> StopRule:
        """The rule of a policy's completions."""
        return cls(
            stop_ids=frozenset(policy.stop_token_ids),
            stop_strings=tuple(sampling.stop),
            max_new_tokens=sampling.max_new_tokens,
            tokenizer=policy.tokenizer,
        )

    def after(self, token_ids: Sequence[int], *, max_new_tokens: int) -> StopRule:
        """The rule of what continues a completion that begins with ``token_ids``."""
        before = tuple(token_ids[-self._window_tokens :]) if self.stop_strings else ()
        return replace(self, before=before, max_new_tokens=max_new_tokens)

    def completion(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> Completion:
        """The record of a finished completion; its text is without the stop id."""
        return Completion(
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs),
            finish="stop" if self.stopped(token_ids) else "length",
            text=self.text(token_ids),
        )

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of a completion, without its stop id."""
        text_ids = token_ids[:-1] if token_ids[-1] in self.stop_ids else token_ids
        return self.tokenizer.decode(text_ids, clean_up_tokenization_spaces=False)

    @property
    def _window_tokens(self) -> int:
        return 1 + _TOKENS_PER_CHARACTER * max(len(text) for text in self.stop_strings)

    def _has_stop_string(self, token_ids: Sequence[int]) -> bool:
        text = self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self.stop_strings)

    def _string_end(self, token_ids: Sequence[int], start: int) -> int | None:
        """Number of tokens up to the first one at or after ``start`` that completes a stop string."""
        window, shift, token_ids = self._window_tokens, len(self.before), [*self.before, *token_ids]
        start += shift
        if not self._has_stop_string(token_ids[max(0, start + 1 - window) :]):
            return None
        for end in range(start + 1, len(token_ids) + 1):
            if self._has_stop_string(token_ids[max(0, end - window) : end]):
                return end - shift
        return None

    def end(self, token_ids: Sequence[int], start: int) -> int | None:
        """Number of tokens the completion keeps, or None if it goes on. Tokens before ``start`` were asked already."""
        inside = range(start, min(len(token_ids), self.max_new_tokens))
        end = next((i + 1 for i in inside if token_ids[i] in self.stop_ids), None)
        if end is None and len(token_ids) >= self.max_new_tokens:
            end = self.max_new_tokens
        if self.stop_strings:
            end = self._string_end(token_ids[:end], start) or end
        return end

    def stopped(self, token_ids: Sequence[int]) -> bool:
        """Whether a finished completion stopped by itself, rather than being cut at the limit."""
        if token_ids[-1] in self.stop_ids:
            return True
        if not self.stop_strings:
            return False
        return self._has_stop_string([*self.before, *token_ids][-self._window_tokens :])
