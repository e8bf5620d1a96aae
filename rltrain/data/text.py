"""Plain text for RLP (arXiv 2510.01265): a document cut at a random token, a thought opened, what follows as target."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, overload

from rltrain.config import MISSING, DataConfig
from rltrain.data.hub import HubConfig, hub
from rltrain.errors import require
from rltrain.policy.tokenizer import start_ids
from rltrain.registry import register
from rltrain.types import Problem, Prompt, TokenProblem


@dataclass(kw_only=True)
class CutConfig(DataConfig):
    """Where a document is cut, in tokens: ``t`` uniform in [min_prefix, max_prefix], ``horizon`` targets after it.

    With ``horizon=0`` the cut is directly after ``after``, and all that follows is the target.
    Each document comes with ``positions`` cuts, each a pure function of (seed, document, number of the cut). With
    ``after`` every prefix holds that string, as an answer's mark. The prompt is ``instruction``, the prefix, and
    ``opening``; a thought ends with ``closing``, which ``sampling.stop`` must hold.
    A ``plain_share`` of the cuts opens no thought: for cold starts, so that the text without one stays likely.
    """

    min_prefix: int = 1  # earliest cut of a document, in tokens
    max_prefix: int = 1024  # latest cut, in tokens
    horizon: int = 1  # target tokens; 0: all that follows data.after
    positions: int = 1
    after: str = ""
    instruction: str = ""
    opening: str = "<think>"
    closing: str = "</think>"
    plain_share: float = 0.0
    seed: int = 0  # of the cuts

    def __post_init__(self) -> None:
        require(self.min_prefix >= 1, f"data.min_prefix={self.min_prefix}: a target needs a token before it; set >= 1")
        require(
            self.max_prefix >= self.min_prefix,
            f"data.max_prefix={self.max_prefix}: below data.min_prefix={self.min_prefix}; raise it",
        )
        require(self.horizon >= 0, f"data.horizon={self.horizon}: must be >= 0; 0 takes all that follows data.after")
        require(
            self.horizon > 0 or bool(self.after),
            "data.horizon=0: takes all that follows data.after, which is empty; set it, or a horizon of at least 1",
        )
        require(self.positions >= 1, f"data.positions={self.positions}: set at least 1")
        require(
            self.horizon > 0 or self.positions == 1,
            f"data.positions={self.positions} with data.horizon=0: all cuts are at the mark; set data.positions=1",
        )
        require(0 <= self.plain_share <= 1, f"data.plain_share={self.plain_share}: must lie in [0, 1]")
        require(bool(self.closing), "data.closing: is empty, so that no thought ever ends; set a tag")


@dataclass(frozen=True, kw_only=True)
class TextPrompt(Prompt):
    """``token_ids`` = instruction, prefix, opening tag; ``context_ids`` the prefix alone; ``target_ids`` follow it."""

    context_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    closing: str
    closing_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Document(TokenProblem):
    """One cut of a document; a document too short for it has no prompt."""

    config: CutConfig
    thinks: bool = True

    def position(self, tokens: int, least: int = 0) -> int | None:
        """The cut: uniform among the admissible ones from ``least`` on in so many tokens; None if there is none.

        With ``horizon=0`` it is ``least``, where that is admissible.
        """
        last = tokens - self.config.horizon if self.config.horizon else min(least, tokens - 1)
        low, high = max(self.config.min_prefix, least), min(self.config.max_prefix, last)
        if high < low:
            return None
        return low + int(uniform("cut", self.config.seed, self.id) * (high - low + 1))

    def encode(self, tokenizer: Any, render: Callable[[str], tuple[int, ...]]) -> TextPrompt:
        """The whole document is tokenised once, and the ids are cut: a prefix of its text might have other ids."""

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

        assert isinstance(self.prompt, str)
        start, body = start_ids(tokenizer), ids(self.prompt)
        start = () if start == body[: len(start)] else start  # the text writes it itself
        config = self.config
        cut = self.position(len(body), least_prefix(tokenizer, body, config.after))
        prefix, rest = (body[:cut], body[cut:]) if cut is not None else ((), ())
        before, after = (ids(config.instruction), ids(config.opening)) if self.thinks else ((), ())
        prompt_ids = start + before + prefix + after if cut is not None else ()
        return TextPrompt(
            problem=self,
            token_ids=prompt_ids,
            continuation_ids=rest,
            context_ids=start + prefix,
            target_ids=rest[: config.horizon or None],
            closing=config.closing,
            closing_ids=ids(config.closing),
        )


def least_prefix(tokenizer: Any, token_ids: Sequence[int], mark: str) -> int:
    """Tokens of the shortest prefix whose text holds ``mark``; one more than there are if none does."""
    lengths = range(len(token_ids) + 1)
    return bisect_left(lengths, True, key=lambda length: mark in tokenizer.decode(token_ids[:length]))


def uniform(*key: Hashable) -> float:
    """A number in [0, 1): a pure function of the key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def mixed(index: int, first: int, ramp: int) -> float:
    """How far item ``index`` is in a data set's last mixture: 0 for the first ``first``, 1 after ``ramp`` more."""
    return 0.0 if index < first else min(1.0, (index - first) / ramp) if ramp else 1.0


class Documents(Sequence[Document]):
    """``positions`` cuts of each text, all texts at their first cut before any at its second."""

    def __init__(self, texts: Sequence[Problem], config: CutConfig) -> None:
        self.texts, self.config = texts, config

    def __len__(self) -> int:
        return len(self.texts) * self.config.positions

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        number, row = divmod(range(len(self))[index], len(self.texts))
        text = self.texts[row]
        name, config = f"{text.id}@{number}", self.config
        thinks = uniform("plain", config.seed, name) >= config.plain_share
        meta = text.meta if thinks else {**text.meta, "solution": ""}
        return Document(id=name, prompt=text.prompt, answer=text.answer, meta=meta, config=config, thinks=thinks)


@dataclass(kw_only=True)
class TextConfig(CutConfig):
    """Text through ``datasets``: a hub name or folder, JSONL or parquet. Keys as for :class:`HubConfig`."""

    path: str = MISSING  # hub name, folder, JSONL or parquet
    subset: str | None = None  # configuration of the data set
    train_split: str = "train"  # name of the training split
    validation_split: str | None = None  # null: a fixed share of the training rows
    test_split: str | None = None  # null: a fixed share of the training rows
    holdout: float = 0.05  # share of the rows held out where a split has no name
    column: str = "text"  # that holds the text
    id: str | None = None  # column of ids; null: numbers
    limit: int | None = None  # rows that are taken; null: all


@register("data", "plain_text", TextConfig)
def text(config: TextConfig, split: str) -> Documents:
    """The documents of ``split``; rows without text are logged and left out."""
    rows = HubConfig(
        path=config.path,
        subset=config.subset,
        train_split=config.train_split,
        validation_split=config.validation_split,
        test_split=config.test_split,
        holdout=config.holdout,
        prompt=f"{{{config.column}}}",
        answer=None,
        id=config.id,
        limit=config.limit,
    )
    return Documents(hub(rows, split), config)
