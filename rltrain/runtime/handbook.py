"""Configs of the behaviour handbook: which entries go into a data set's prompts, and how entries are extracted."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rltrain.errors import ConfigError, require, require_one_of

BEHAVIOURS, QUESTION = "{behaviours}", "{question}"
_USE = "These behaviours may help. Use those that fit, and name each that you use.\n{behaviours}"
TEMPLATES = {"question": f"{_USE}\n\n{QUESTION}", "system": _USE}
REFLECT = """\
Here are a question and a solution of it. Reflect on the solution. Which steps are of use for other questions, too?
Which steps were said twice, or could be left out by someone who knows a general rule? Which rule is that?

Question: {question}

Solution: {solution}
"""
EXTRACT = """\
Here are a question, a solution, and a reflection on the solution. Write the general behaviours that would help to
solve other questions with fewer words. A behaviour is a name and one sentence that says what to do and when. It must
not speak of this question. Write each behaviour on a line of its own in the form

behavior_short_name: one sentence

and write nothing else. Write NONE if there is no such behaviour.

Question: {question}

Solution: {solution}

Reflection: {reflection}
"""
LINE = r"(?:[-*] |\d+[.)] )?behaviou?r_(?P<name>\w+): *(?P<instruction>\S.*)"


@dataclass(kw_only=True)
class HandbookKeysConfig:
    """The keys of a data set that put entries of a behaviour handbook into its prompts (2509.13237)."""

    handbook: str | None = None  # a file of behaviours, written by rltrain handbook extract or by hand; null: none
    handbook_top: int = 5  # at most so many entries in a prompt
    handbook_by: str = "tag"  # what finds a problem's entries: tag, words (TF-IDF), or embedding
    handbook_tag: str = "tag"  # by tag: the entry of problem.meta with a problem's tag or tags
    handbook_model: str | None = None  # by embedding: folder or hub name of the model whose mean hidden states compare
    handbook_place: str = "question"  # around the question, or in the system message: question, system
    handbook_template: str | None = None  # the text, with {behaviours}, and {question} in its place; null: by place
    handbook_entry: str = "{name}: {instruction}"  # a line of {behaviours}

    def template(self) -> str:
        """The text that is put into the prompt."""
        return TEMPLATES[self.handbook_place] if self.handbook_template is None else self.handbook_template

    def check_handbook(self, key: str) -> None:
        """``ConfigError`` for keys that do not go together; ``key`` is where this config stands."""
        require_one_of(("tag", "words", "embedding"), f"{key}.handbook_by", self.handbook_by)
        require_one_of(tuple(TEMPLATES), f"{key}.handbook_place", self.handbook_place)
        require(self.handbook_top >= 1, f"{key}.handbook_top={self.handbook_top}: set at least 1")
        by_embedding = self.handbook_by == "embedding"
        require(
            by_embedding == (self.handbook_model is not None),
            f"{key}.handbook_by={self.handbook_by} with {key}.handbook_model={self.handbook_model}: embeddings come "
            "from a named model, and nothing else reads it; set both or neither",
        )
        require(BEHAVIOURS in self.template(), f"{key}.handbook_template: lacks {BEHAVIOURS}; add it")
        asks = QUESTION in self.template()
        require(
            asks == (self.handbook_place == "question"),
            f"{key}.handbook_template: {'has' if asks else 'lacks'} {QUESTION}, with {key}.handbook_place="
            f"{self.handbook_place}; {'take it out' if asks else 'add it'}",
        )
        require("{instruction}" in self.handbook_entry, f"{key}.handbook_entry: lacks {{instruction}}; add it")


@dataclass(kw_only=True)
class HandbookConfig:
    """``rltrain handbook``: whose solutions are read, and how the model is asked about them.

    ``reflect`` has ``{question}`` and ``{solution}``, ``extract`` also ``{reflection}``. Both are asked without
    ``model.system`` and ``model.examples``, which are about the questions themselves.
    """

    split: str = "train"  # whose problems are solved or read
    problems: int = 0  # how many; 0: all
    samples: int = 1  # completions of each problem that is solved; the first that is kept counts
    keep: str = "right"  # which solutions: right, wrong, or all
    batch_size: int = 64  # problems at a time
    temperature: float = 0.7  # of reflections and extractions
    max_new_tokens: int = 512  # longest reflection, and longest extraction
    max_prompt_tokens: int = 4096  # traces with longer prompts of reflection or extraction are left out
    most_words: int = 60  # longer instructions are refused
    reflect: str = REFLECT
    extract: str = EXTRACT
    line: str = LINE  # regular expression of a whole line with a behaviour: groups name and instruction

    def __post_init__(self) -> None:
        require_one_of(("right", "wrong", "all"), "handbook.keep", self.keep)
        require(self.problems >= 0, f"handbook.problems={self.problems}: must be >= 0; 0 takes all")
        require(self.temperature >= 0, f"handbook.temperature={self.temperature}: must be >= 0 (0 is greedy)")
        for key in ("samples", "batch_size", "max_new_tokens", "max_prompt_tokens", "most_words"):
            require(getattr(self, key) >= 1, f"handbook.{key}={getattr(self, key)}: set at least 1")
        for key, places in (("reflect", "question solution"), ("extract", "question solution reflection")):
            for place in places.split():
                require(f"{{{place}}}" in getattr(self, key), f"handbook.{key}: lacks {{{place}}}; add it")
        try:
            groups = re.compile(self.line).groupindex
        except re.error as error:
            raise ConfigError(f"handbook.line={self.line}: no regular expression ({error}); mend it") from None
        require(
            {"name", "instruction"} <= set(groups),
            f"handbook.line={self.line}: lacks a group name or instruction; add (?P<name>…) and (?P<instruction>…)",
        )
