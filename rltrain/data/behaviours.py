"""What a model answers when it is asked for behaviours: entries, refused lines, and entries of equal names merged."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rltrain.data.handbook import normalised
from rltrain.runtime.handbook import HandbookConfig

NO_BEHAVIOUR, CUT, LONG, NO_NAME = "no behaviour", "cut", "too long", "no name"
NOTHING = "none"


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """The (name, instruction) pairs of an answer, and the lines that are none, each with its reason."""

    entries: tuple[tuple[str, str], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()


def parse(answer: str, config: HandbookConfig, *, cut: bool) -> Parsed:
    """The lines that match ``config.line`` whole; empty lines and NONE are neither. Names are normalised.

    Refused: ``no behaviour``, a line of another form; ``too long``, over ``most_words``; ``no name``, a name without a
    letter; ``cut``, the last line of an answer that ran into the limit.
    """
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    entries, refused = [], []
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(config.line, line)
        name = normalised(match["name"]) if match else ""
        why = NO_BEHAVIOUR if match is None else NO_NAME if not name else ""
        if match and not why and len(match["instruction"].split()) > config.most_words:
            why = LONG
        if cut and number == len(lines):
            why = CUT
        if not why and match:
            entries.append((name, match["instruction"]))
        elif why and line.strip(".").casefold() != NOTHING:
            refused.append((line, why))
    return Parsed(entries=tuple(entries), refused=tuple(refused))


@dataclass(kw_only=True)
class Merged:
    """An entry with the tags of the problems that it came from and its origins."""

    name: str
    instruction: str
    tags: list[str] = field(default_factory=list)
    origins: list[Mapping[str, Any]] = field(default_factory=list)


def merged(rows: Sequence[Mapping[str, Any]]) -> list[Merged]:
    """One entry per normalised name: the first instruction, all tags, an origin per trace.

    Entries of more origins come first, of equally many the earlier. ``rows`` have ``entries``, ``tags``, ``origin``.
    """
    found: dict[str, Merged] = {}
    for row in rows:
        for name, instruction in row["entries"]:
            entry = found.setdefault(name, Merged(name=name, instruction=instruction))
            entry.tags += [tag for tag in row["tags"] if tag not in entry.tags]
            if row["origin"] not in entry.origins:
                entry.origins.append(row["origin"])
    return sorted(found.values(), key=lambda entry: -len(entry.origins))


def written(entries: Sequence[Merged]) -> str:
    """The text of a handbook with these entries: a first line with all tags, then an entry per line."""
    tags = sorted({tag for entry in entries for tag in entry.tags})
    head = [{"tags": tags}] if tags else []
    lines = [*head, *({name: value for name, value in vars(entry).items() if value} for entry in entries)]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
