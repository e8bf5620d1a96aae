"""What an environment says, as ids: its text alone, between the chat template's own markers where it has a role.

    ids = [end of the model's turn, if it wrote none] + markers of the role + text + end of message + generation prompt

The text is tokenised by itself and as plain text, so that nothing in it becomes a special or added token: "</s>" or
"<|im_start|>assistant" in a reply stay letters. The markers are the difference between two renderings of the template.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rltrain.config import ModelConfig
from rltrain.errors import ConfigError, require
from rltrain.policy.encode import BadPrompt, chat_text

CUT_MARK = "[cut]"
# They stand in a conversation that is rendered to see what lies between and behind them.
_QUESTION, _WRITTEN, _OBSERVED = "7f3a-question", "7f3a-written", "7f3a-observed"
_ANCHOR = "\n"
_CHARACTERS_PER_TOKEN = 64  # what lies behind so many of a long text is not tokenised


def plain_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The ids of a text by itself, without any special or added token, whatever the text says.

    Ids of unknown characters stay, unless such an id ends a text. White space that is an added token is plain text.
    """
    ids = _model_ids(tokenizer, text)
    barred = _barred_ids(tokenizer)
    if barred.isdisjoint(ids):
        return ids
    # A unigram model knows its control tokens as pieces; a piece of such a text cannot be one.
    ids = tuple(token for piece in _pieces(tokenizer, text) for token in _model_ids(tokenizer, piece))
    return tuple(token for token in ids if token not in barred)


def _model_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """What the tokenizer's own model makes of a text, without added tokens and without a space put before it."""
    if not text:
        return ()
    if not tokenizer.is_fast:
        return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    if _puts_space_before(tokenizer):
        anchor, whole = _backend_ids(tokenizer, _ANCHOR), _backend_ids(tokenizer, _ANCHOR + text)
        if whole[: len(anchor)] == anchor:
            return whole[len(anchor) :]
    return _backend_ids(tokenizer, text)


def _backend_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    splits = [text]
    if backend.pre_tokenizer is not None:
        splits = [split for split, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return tuple(token.id for split in splits for token in backend.model.tokenize(split))


@lru_cache(maxsize=8)
def _puts_space_before(tokenizer: Any) -> bool:
    """Whether a text begins with a space that it does not have, as with most SentencePiece models."""
    ids = _backend_ids(tokenizer, "1")
    return bool(ids) and tokenizer.convert_ids_to_tokens(ids[0]).startswith("▁")


@lru_cache(maxsize=8)
def _barred_ids(tokenizer: Any) -> frozenset[int]:
    """Special and added tokens that a text could spell, and whatever else ends a text."""
    added = {index for token, index in tokenizer.get_added_vocab().items() if len(token.strip()) > 1}
    known = added | set(tokenizer.all_special_ids)
    return frozenset(known - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}) - {None}


@lru_cache(maxsize=8)
def _spellings(tokenizer: Any) -> re.Pattern[str]:
    tokens = tokenizer.convert_ids_to_tokens(sorted(_barred_ids(tokenizer)))
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def _pieces(tokenizer: Any, text: str) -> list[str]:
    """The text, cut behind the first character of every special or added token that it spells."""
    cuts = [0, *(found.start() + 1 for found in _spellings(tokenizer).finditer(text)), len(text)]
    return [text[start:stop] for start, stop in itertools.pairwise(cuts) if start < stop]


@dataclass(frozen=True, kw_only=True)
class Observer:
    """Makes the ids of observations.

    ``before`` are the ids from the end of the model's turn to the text, ``after`` those from the text to the model's
    next turn. Both are empty without a role.
    """

    tokenizer: Any
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, role: str | None, config: ModelConfig) -> Observer:
        """``ConfigError`` for a role that the chat template does not know, or markers that cannot be written."""
        if role is None:
            return cls(tokenizer=tokenizer)
        before, after = _markers(tokenizer, role, config)
        made = cls(tokenizer=tokenizer, before=_marker_ids(tokenizer, before), after=_marker_ids(tokenizer, after))
        for text, ids in ((before, made.before), (after, made.after)):
            read = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            require(
                "".join(read.split()) == "".join(text.split()),  # SentencePiece may put spaces behind markers
                f"environment: the tokenizer reads the chat template's markers of the role {role!r} as {read!r}, and "
                f"they are {text!r}; take the model's own tokenizer and template",
            )
        return made

    def text_ids(self, text: str, *, most_tokens: int) -> tuple[tuple[int, ...], bool]:
        """The ids of a text alone, cut to ``most_tokens`` with a mark at the end, and whether they were cut."""
        begin = text[: _CHARACTERS_PER_TOKEN * most_tokens]
        ids = plain_ids(self.tokenizer, begin)
        if len(ids) <= most_tokens and begin == text:
            return ids, False
        mark = plain_ids(self.tokenizer, CUT_MARK)
        mark = mark if len(mark) < most_tokens else ()
        return ids[: most_tokens - len(mark)] + mark, True

    def framed(self, text_ids: Sequence[int], last_id: int) -> tuple[int, ...]:
        """The observation after a turn whose last id is ``last_id``: an end of turn that the model wrote stays one."""
        before = self.before[1:] if self.before[:1] == (last_id,) else self.before
        return (*before, *text_ids, *self.after)


def _markers(tokenizer: Any, role: str, config: ModelConfig) -> tuple[str, str]:
    """What the template puts between the model's turn and a message of ``role``, and behind that message."""
    require(
        tokenizer.chat_template is not None,
        f"environment: replies have the role {role!r} and the tokenizer has no chat template; use an environment whose "
        "role is None, or put the chat model's chat_template.jinja beside the tokenizer",
    )
    messages = [("user", _QUESTION), ("assistant", _WRITTEN), (role, _OBSERVED)]
    try:
        text = chat_text(tokenizer, [{"role": who, "content": content} for who, content in messages], config)
    except BadPrompt as error:
        cause = str(error).partition("(")[2].partition(";")[0] or str(error)
        raise ConfigError(
            f"environment: the chat template refuses the role {role!r} ({cause}; {_other_role()}"
        ) from error
    _, written, rest = text.partition(_WRITTEN)
    before, observed, after = rest.partition(_OBSERVED)
    require(
        bool(written and observed),
        f"environment: the chat template does not write messages of the role {role!r}; {_other_role()}",
    )
    return before, after


def _other_role() -> str:
    return "choose another role (tool, user), or None for replies without markers"


def _marker_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The ids of a piece of the template's own text, its special tokens included."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


def check_texts(texts: Iterable[str], tokenizer: Any) -> None:
    """``ConfigError`` where the tokenizer cannot write what ends a turn, a tag, or what stands around a reply."""
    for text in filter(None, texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        written = tokenizer.decode(ids)
        if tokenizer.unk_token_id in ids or written.strip() != text.strip():
            raise ConfigError(
                f"environment: the tokenizer cannot write {text!r} (it gives {written!r}); set another "
                "environment.tag, stop or reply_format, or another model"
            )
