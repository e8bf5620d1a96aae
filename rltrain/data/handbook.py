"""A behaviour handbook: the file, which entries belong to a problem, and how they go into its prompt (2509.13237).

A JSONL file. The first line names the tags, ``{"tags": ["algebra"]}``; without tags it may be missing. Each further
line is an entry: ``name``, ``instruction``, and, where there are any, ``tags`` and ``origins``.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from rltrain.config import ConfigError, DataConfig
from rltrain.data import embeddings
from rltrain.data.mixture import Mixture
from rltrain.errors import require
from rltrain.registry import part_of
from rltrain.types import AdvisedProblem, Message, Problem, TokenProblem, user_text

KEYS = ("name", "instruction", "tags", "origins")
TRIED = 1000  # problems from all over the data, of which some must have an entry
GENERAL = 0.5  # score of an entry without tags, below any shared tag
_PLACES = re.compile(r"\{(\w+)\}")
_WORD = re.compile(r"\w+")

Scores = Callable[[Problem], Sequence[float]]  # of every entry, in the file's order; those above 0 may be used


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """An entry, and the number of its line in the file, from 1."""

    row: int
    name: str
    instruction: str
    tags: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What a question is compared with."""
        return " ".join([self.name.replace("_", " "), self.instruction, *self.tags])


@dataclass(frozen=True, kw_only=True)
class Handbook:
    """The entries of a file, in its order."""

    path: Path
    behaviours: tuple[Behaviour, ...]

    @cached_property
    def tags(self) -> frozenset[str]:
        """The tags of all entries."""
        return frozenset(tag for each in self.behaviours for tag in each.tags)


def normalised(name: str) -> str:
    """A name in lower case, its words joined by ``_``, without ``behaviour_`` before it: equal names are one entry."""
    words = re.sub(r"[\W_]+", "_", name.casefold()).strip("_")
    return re.sub(r"^behaviou?r_", "", words)


# --- the file ----------------------------------------------------------------------------------------------------


def read(path: Path, key: str) -> Handbook:
    """The handbook at ``path``. ConfigError with the line and what to do, under the name of the setting ``key``."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON strings may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"{key}={path}: cannot be read ({cause}); rltrain handbook extract writes one") from None
    places = [(row, f"{key}={path} row {row}") for row in range(1, len(lines) + 1) if lines[row - 1].strip()]
    rows = [(row, place, _parsed(lines[row - 1], place)) for row, place in places]
    known = _tags(rows[0][2], rows[0][1]) if rows and "name" not in rows[0][2] else None
    entries = rows if known is None else rows[1:]
    behaviours = tuple(_entry(plain, row, place, known or ()) for row, place, plain in entries)
    require(bool(behaviours), f"{key}={path}: has no entry; add lines with name and instruction")
    _refuse_duplicates(behaviours, f"{key}={path}")
    return Handbook(path=path, behaviours=behaviours)


def _parsed(line: str, place: str) -> Mapping[str, Any]:
    try:
        plain = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place}: is no JSON ({error}); mend the line") from None
    require(isinstance(plain, dict), f'{place}: is no entry; give {{"name": …, "instruction": …}}')
    return plain


def _tags(header: Mapping[str, Any], place: str) -> tuple[str, ...]:
    is_header = set(header) == {"tags"} and _are_texts(header["tags"])
    require(is_header, f'{place}: neither an entry with a name nor a first line {{"tags": […]}}; mend it')
    return tuple(header["tags"])


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) and each.strip() for each in value)


def _entry(plain: Mapping[str, Any], row: int, place: str, known: Sequence[str]) -> Behaviour:
    for other in sorted(set(plain) - set(KEYS)):
        raise ConfigError(f"{place}: {other} is no key of an entry; choose of {', '.join(KEYS)}")
    for name in ("name", "instruction"):
        value = plain.get(name)
        require(isinstance(value, str) and bool(value.strip()), f"{place}: its {name} is empty; write it, or delete it")
    require(bool(normalised(plain["name"])), f"{place}: its name {plain['name']!r} has no letter; give another")
    tags = plain.get("tags", [])
    require(_are_texts(tags), f'{place}: its tags are no list of texts; give ["algebra"], or leave them out')
    for tag in tags:
        listed = f"row 1 lists {', '.join(known)}" if known else 'row 1 lists no tags, {"tags": […]}'
        require(tag in known, f"{place}: its tag {tag} is unknown, {listed}; mend the tag, or add it there")
    return Behaviour(row=row, name=plain["name"], instruction=plain["instruction"], tags=tuple(tags))


def _refuse_duplicates(behaviours: Sequence[Behaviour], place: str) -> None:
    rows: dict[str, int] = {}
    for each in behaviours:
        first = rows.setdefault(normalised(each.name), each.row)
        same = f"{place} row {each.row}: its name {each.name} is also that of row {first}; merge the two, or rename one"
        require(first == each.row, same)


# --- retrieval ---------------------------------------------------------------------------------------------------


def tags_of(problem: Problem, entry: str, key: str) -> list[str]:
    """A problem's tags as text, from its ``meta``: a value, or a list of values. ConfigError where it has none."""
    if entry not in problem.meta:
        raise ConfigError(
            f"{key}.handbook_tag={entry}: problem {problem.id} has no such entry of meta, it has "
            f"{', '.join(problem.meta) or 'none'}; name one of them, or set {key}.handbook_by=words"
        )
    value = problem.meta[entry]
    return [str(each) for each in (value if isinstance(value, (list, tuple)) else [value])]


def by_tag(behaviours: Sequence[Behaviour], entry: str, key: str) -> Scores:
    """The number of tags that entry and problem share. An entry without tags is for every problem, after those."""

    def scores(problem: Problem) -> list[float]:
        its = set(tags_of(problem, entry, key))
        return [float(len(its & set(each.tags))) if each.tags else GENERAL for each in behaviours]

    return scores


def by_words(behaviours: Sequence[Behaviour]) -> Scores:
    """Cosine of TF-IDF vectors: count·(ln((1 + n)/(1 + df)) + 1), words in lower case, n and df over the entries.

    Words of the question that no entry has do not count.
    """
    counts = [Counter(words(each.text)) for each in behaviours]
    frequency = Counter(word for each in counts for word in each)
    weights = {word: math.log((1 + len(counts)) / (1 + df)) + 1 for word, df in frequency.items()}
    vectors = [_unit({word: count * weights[word] for word, count in each.items()}) for each in counts]

    def scores(problem: Problem) -> list[float]:
        asked = Counter(word for word in words(user_text(problem.prompt)) if word in weights)
        query = _unit({word: count * weights[word] for word, count in asked.items()})
        return [sum(value * vector.get(word, 0.0) for word, value in query.items()) for vector in vectors]

    return scores


def words(text: str) -> list[str]:
    """The words and numbers of a text, in lower case."""
    return _WORD.findall(text.casefold())


def _unit(vector: Mapping[str, float]) -> dict[str, float]:
    norm = math.sqrt(sum(value**2 for value in vector.values()))
    return {word: value / norm for word, value in vector.items()} if norm else {}


def by_embedding(behaviours: Sequence[Behaviour], embed: Callable[[str], Any]) -> Scores:
    """Cosine of the unit vectors that ``embed`` makes of a text."""
    vectors = [embed(each.text) for each in behaviours]

    def scores(problem: Problem) -> list[float]:
        query = embed(user_text(problem.prompt))
        return [float(query @ vector) for vector in vectors]

    return scores


def scores_of(handbook: Handbook, config: DataConfig, key: str) -> Scores:
    """The scores by ``handbook_by``."""
    if config.handbook_by == "tag":
        return by_tag(handbook.behaviours, config.handbook_tag, key)
    if config.handbook_by == "words":
        return by_words(handbook.behaviours)
    assert config.handbook_model is not None
    return by_embedding(handbook.behaviours, embeddings.embedder(config.handbook_model, f"{key}.handbook_model"))


def best(behaviours: Sequence[Behaviour], scores: Sequence[float], top: int) -> list[Behaviour]:
    """The ``top`` entries of the highest scores above 0; of equal ones the earlier in the file."""
    ranked = sorted(zip(scores, behaviours, strict=True), key=lambda pair: (-pair[0], pair[1].row))
    return [each for score, each in ranked[:top] if score > 0]


# --- the prompt --------------------------------------------------------------------------------------------------


def filled(template: str, **texts: str) -> str:
    """The template with its places filled at once: a brace within a text is no place."""
    return _PLACES.sub(lambda place: texts.get(place[1], place[0]), template)


def advised(problem: Problem, chosen: Sequence[Behaviour], config: DataConfig, *, path: Path, key: str) -> Problem:
    """The problem with the chosen entries in its prompt; without any, its prompt as it is."""
    lines = "\n".join(filled(config.handbook_entry, name=each.name, instruction=each.instruction) for each in chosen)
    prompt, as_system = problem.prompt, False
    if chosen and config.handbook_place == "system":
        prompt, as_system = _with_system(prompt, filled(config.template(), behaviours=lines))
    elif chosen:
        prompt = _around_question(problem, config.template(), lines, key)
    return AdvisedProblem(
        id=problem.id,
        prompt=prompt,
        answer=problem.answer,
        meta=problem.meta,
        bare=problem.prompt,
        behaviours=tuple(each.name for each in chosen),
        rows=f"{key}.handbook={path} rows {', '.join(str(each.row) for each in chosen)}",
        as_system=as_system,
    )


def _with_system(prompt: str | Sequence[Message], text: str) -> tuple[Sequence[Message], bool]:
    """The text behind the row's system message, or as a message of its own, which the second value says."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(each) for each in prompt]
    first = messages[0]
    if first["role"] == "system":
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]], False
    return [{"role": "system", "content": text}, *messages], True


def _around_question(problem: Problem, template: str, lines: str, key: str) -> str | Sequence[Message]:
    """The template around the text, or around the last message, which must be the user's."""
    if isinstance(problem.prompt, str):
        return filled(template, behaviours=lines, question=problem.prompt)
    *before, last = problem.prompt
    require(
        last.get("role") == "user" and isinstance(last.get("content"), str),
        f"{key}.handbook_place=question: the last message of problem {problem.id} is not a text of the user; set "
        f"{key}.handbook_place=system",
    )
    return [*before, {**last, "content": filled(template, behaviours=lines, question=last["content"])}]


class AdvisedProblems(Sequence[Problem]):
    """The problems of a data set with a handbook's entries, chosen when a problem is asked for."""

    def __init__(self, problems: Sequence[Problem], handbook: Handbook, config: DataConfig, key: str) -> None:
        self._problems, self._handbook, self._config, self._key = problems, handbook, config, key
        self._scores = scores_of(handbook, config, key)

    def chosen(self, problem: Problem) -> list[Behaviour]:
        """A problem's entries; a pure function of the problem and the file."""
        return best(self._handbook.behaviours, self._scores(problem), self._config.handbook_top)

    def __len__(self) -> int:
        return len(self._problems)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        problem = self._problems[index]
        return advised(problem, self.chosen(problem), self._config, path=self._handbook.path, key=self._key)


def with_handbook(problems: Sequence[Problem], config: DataConfig, key: str = "data") -> Sequence[Problem]:
    """The problems with entries of ``config.handbook``; as they are where there is none.

    ConfigError for problems that make their own prompts, and by tag where no problem of up to TRIED has an entry.
    """
    if config.handbook is None or len(problems) == 0:
        return problems
    require(
        not isinstance(problems[0], TokenProblem),
        f"{key}.handbook={config.handbook}: these problems make their own prompts, where no entry can be put; leave it "
        "out, or choose data with questions as text",
    )
    handbook = read(Path(config.handbook).expanduser(), f"{key}.handbook")
    found = AdvisedProblems(problems, handbook, config, key)
    if config.handbook_by == "tag":
        _refuse_other_tags(found, problems, handbook, config, key)
    return found


def _refuse_other_tags(
    found: AdvisedProblems, problems: Sequence[Problem], handbook: Handbook, config: DataConfig, key: str
) -> None:
    indices = range(0, len(problems), max(1, len(problems) // TRIED))[:TRIED]
    if any(found.chosen(problems[index]) for index in indices):
        return
    theirs = sorted({tag for index in indices for tag in tags_of(problems[index], config.handbook_tag, key)})
    raise ConfigError(
        f"{key}.handbook={config.handbook}: no entry has a tag of these problems ({config.handbook_tag}: "
        f"{', '.join(theirs[:10])}), its tags are {', '.join(sorted(handbook.tags))}; give another file, or set "
        f"{key}.handbook_tag"
    )


def problems_of(config: DataConfig, split: str, key: str = "data") -> Sequence[Problem]:
    """A split of a data set, with its handbook's entries in the prompts; in a mixture by source."""
    problems: Sequence[Problem] = part_of(config).function(config, split)
    if not isinstance(problems, Mixture):
        return with_handbook(problems, config, key)
    configs = problems.configs
    if all(source.handbook is None for source in configs.values()):
        return problems
    return problems.mapped(lambda name, source: with_handbook(source, configs[name], f"{key}.sources.{name}"))
