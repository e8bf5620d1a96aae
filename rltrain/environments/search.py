"""Search in a local corpus by BM25: ``<search>capital of Peru</search>`` is answered with the best documents."""

from __future__ import annotations

import heapq
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from rltrain.config import MISSING
from rltrain.environments.tags import ToolConfig, cut
from rltrain.errors import ConfigError, require
from rltrain.registry import register
from rltrain.types import Environment, Problem, Reply

_WORD = re.compile(r"\w+")
NOTHING = "nothing was found"


@dataclass(kw_only=True)
class SearchConfig(ToolConfig):
    """``corpus`` is a JSONL file, each line an object with the text under ``text_field`` and perhaps ``title_field``.

    Scores are BM25 (Robertson and Zaragoza 2009) as ``bm25s`` computes them, over lower-case words. Equal scores keep
    the order of the file. The extra ``rltrain[search]`` brings the library.
    """

    tag: str = "search"  # the model writes <search>…</search>
    reply_tokens: int = 200  # longest observation
    corpus: str = MISSING  # the JSONL file of documents
    text_field: str = "text"  # the field of a document's text
    title_field: str = "title"  # the field of its title, which a document may lack
    results: int = 3  # documents in a reply
    document_characters: int = 200  # of a document that are shown
    k1: float = 1.5  # how fast repeated words saturate
    b: float = 0.75  # how much long documents are held against
    answer_reward: float = 0.0  # reward of a turn whose documents hold Problem.answer

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("results", "document_characters"):
            require(getattr(self, key) >= 1, f"environment.{key}={getattr(self, key)}: set at least 1")
        require(self.k1 >= 0, f"environment.k1={self.k1}: must be >= 0; 1.5 is usual")
        require(0 <= self.b <= 1, f"environment.b={self.b}: must lie in [0, 1]; 0.75 is usual")
        require(
            importlib.util.find_spec("bm25s") is not None,
            "environment=search: needs the library bm25s, which is not installed; pip install 'rltrain[search]'",
        )
        if self.corpus != MISSING:
            read_documents(self.corpus, self.text_field, self.title_field)


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A row of the corpus."""

    title: str
    text: str

    @property
    def words(self) -> list[str]:
        return _WORD.findall(f"{self.title} {self.text}".lower())


@lru_cache(maxsize=2)
def read_documents(path: str, text_field: str, title_field: str) -> tuple[Passage, ...]:
    """The documents of a corpus, in order; ``ConfigError`` for a missing file, and for a row without text."""
    if not Path(path).is_file():
        raise ConfigError(f"environment.corpus={path}: no such file; give a JSONL file of documents")
    documents = tuple(_rows(path, text_field, title_field))
    require(bool(documents), f"environment.corpus={path}: holds no document; give one JSON object a line")
    return documents


def _rows(path: str, text_field: str, title_field: str) -> Iterator[Passage]:
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            place = f"environment.corpus={path}: line {number}"
            try:
                row = json.loads(line)
            except ValueError:
                raise ConfigError(f"{place} is not JSON; give one object a line") from None
            text = row.get(text_field) if isinstance(row, dict) else None
            if not isinstance(text, str) or not _WORD.search(text):
                raise ConfigError(
                    f"{place} has no text under {text_field!r}; set environment.text_field, or mend the row"
                )
            yield Passage(title=str(row.get(title_field) or ""), text=" ".join(text.split()))


@register("environment", "search", SearchConfig)
class Search(Environment):
    """The state holds the answer and the numbers of the documents shown so far, which are its key."""

    def __init__(self, config: SearchConfig) -> None:
        self.config = config
        self.stop, self.role = (config.closing,), config.role
        self.documents = read_documents(config.corpus, config.text_field, config.title_field)

    @cached_property
    def index(self) -> Any:
        """The BM25 index of the documents."""
        import bm25s  # pyright: ignore[reportMissingImports]

        made = bm25s.BM25(k1=self.config.k1, b=self.config.b)
        made.index([document.words for document in self.documents], show_progress=False)
        return made

    def prepare(self) -> None:
        assert self.index

    def start(self, problem: Problem) -> dict[str, Any]:
        return {"answer": problem.answer, "seen": []}

    def respond(self, state: Any, text: str) -> Reply:
        query = self.config.call_in(text)
        if query is None:
            return Reply(text="", state=state, done=True)
        best = self.best(query)
        shown = [cut_document(self.documents[number], self.config.document_characters) for number in best]
        right = bool(state["answer"]) and any(state["answer"].lower() in each.lower() for each in shown)
        reward = self.config.call_reward * bool(best) + self.config.answer_reward * right
        result = "\n".join(shown) or NOTHING
        return Reply(
            text=self.config.shown(result),
            state=state | {"seen": [*state["seen"], best]},
            called=True,
            reward=reward,
        )

    def best(self, query: str) -> list[int]:
        """The numbers of the documents with the highest positive scores, the first of equal ones first."""
        scores = self.index.get_scores(_WORD.findall(query.lower()))
        found = scores.nonzero()[0].tolist()
        return heapq.nsmallest(self.config.results, found, key=lambda number: (-scores[number], number))

    def key(self, state: Any) -> str:
        return json.dumps(state["seen"])


def cut_document(document: Passage, characters: int) -> str:
    """Title and text on one line, cut with a mark."""
    whole = f"{document.title}: {document.text}" if document.title else document.text
    return cut(whole, characters).replace("\n", " ")
