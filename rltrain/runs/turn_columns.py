"""The turns of a completion as columns of a samples file, a list per column with a value per turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rltrain.types import Group, Turn

PREFIX = "turn/"
NAMES = tuple(entry.name for entry in dataclasses.fields(Turn))


def columns(groups: Sequence[Group]) -> list[list[dict[str, list[Any]]]]:
    """Per completion of each group its columns ``turn/NAME``, a field of ``Turn`` each; {} where none has turns."""
    any_turns = any(completion.turns for group in groups for completion in group.completions)
    names = NAMES if any_turns else ()
    return [
        [
            {f"{PREFIX}{name}": [getattr(turn, name) for turn in completion.turns] for name in names}
            for completion in group.completions
        ]
        for group in groups
    ]


def turns_of(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    """The turns of a row; () where it has none."""
    kept = {name: row[f"{PREFIX}{name}"] or [] for name in NAMES if f"{PREFIX}{name}" in row}
    return tuple(Turn(**dict(zip(kept, values, strict=True))) for values in zip(*kept.values(), strict=True))
