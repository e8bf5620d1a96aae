"""Existing data sets: a hub name or folder through ``datasets``, a JSONL, JSON or parquet file, or an arrow folder."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from rltrain.config import MISSING, DataConfig
from rltrain.data.boxed import last_boxed
from rltrain.errors import ConfigError, require
from rltrain.registry import register
from rltrain.types import Problem

log = logging.getLogger(__name__)

PLACEHOLDER = re.compile(r"\{([A-Za-z_][\w.]*)\}")
CHOICES = "choices"
JSON_SUFFIXES = (".json", ".jsonl")
FILE_SUFFIXES = (*JSON_SUFFIXES, ".parquet")
IDS_IN_WARNING = 5
Row = Mapping[str, Any]


@dataclass(kw_only=True)
class HubConfig(DataConfig):
    r"""Where the rows are, and which columns become a problem. A dot reaches into one: ``reward_model.ground_truth``.

    ``prompt`` is a template over columns, such as ``"{question}"``; ``{choices}`` stands for the options of column
    ``choices`` (a mapping from letter to text, or a list), printed ``(A) text`` one a line. Alternatively ``messages``
    names a column of chat messages. ``answer_boxed`` takes the content of the answer's last ``\boxed{}``;
    ``answer_pattern`` the first group of a regex's last match. ``meta`` maps names to columns.

    A split without a name in the data (null) is a fixed share ``holdout`` of the training rows, chosen by hash of id.
    """

    path: str = MISSING
    subset: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    test_split: str | None = None
    holdout: float = 0.05
    prompt: str | None = None
    messages: str | None = None
    answer: str = "answer"
    answer_pattern: str | None = None
    answer_boxed: bool = False
    id: str | None = None
    choices: str | None = None
    meta: dict[str, str] = field(default_factory=dict)
    limit: int | None = None

    def __post_init__(self) -> None:
        require(
            (self.prompt is None) != (self.messages is None),
            "data.prompt, data.messages: exactly one makes the prompt; set a template or a column of messages",
        )
        require(
            self.answer_pattern is None or not self.answer_boxed,
            "data.answer_pattern, data.answer_boxed: two ways to the answer; unset one",
        )
        require(0 < self.holdout < 0.5, f"data.holdout={self.holdout}: must lie in (0, 0.5)")
        require(self.limit is None or self.limit >= 1, f"data.limit={self.limit}: set at least 1, or null for all rows")
        require(
            f"{{{CHOICES}}}" not in (self.prompt or "") or self.choices is not None,
            "data.prompt: uses {choices}; set data.choices to the column of options",
        )
        if self.answer_pattern is not None:
            require(_has_group(self.answer_pattern), f"data.answer_pattern={self.answer_pattern!r}: needs a (group)")

    def columns(self) -> dict[str, str]:
        """The key of each mapped column, for messages."""
        named = {"messages": self.messages, "answer": self.answer, "id": self.id, "choices": self.choices}
        mapped = {path: f"data.{key}" for key, path in named.items() if path is not None}
        mapped |= {path: f"data.meta.{name}" for name, path in self.meta.items()}
        return mapped | {path: "data.prompt" for path in PLACEHOLDER.findall(self.prompt or "") if path != CHOICES}


def _has_group(pattern: str) -> bool:
    try:
        return re.compile(pattern).groups >= 1
    except re.error:
        return False


class BadRow(ValueError):
    """Why a row cannot be a problem."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A row that is not in the data set, and why."""

    id: str
    reason: str


class HubProblems(Sequence[Problem]):
    """The good rows; ``left_out`` lists the others."""

    def __init__(self, problems: Sequence[Problem], left_out: Sequence[LeftOut]) -> None:
        self.problems, self.left_out = tuple(problems), tuple(left_out)

    def __len__(self) -> int:
        return len(self.problems)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Problem, ...]: ...
    def __getitem__(self, index: int | slice) -> Problem | tuple[Problem, ...]:
        return self.problems[index]


def _json_rows(path: Path) -> list[Row]:
    """The rows of a file; a line that is no JSON object becomes an empty row, to be reported like any bad row."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        values = json.loads(text)
    else:
        values = [_json_line(line) for line in text.split("\n") if line.strip()]
    return [value if isinstance(value, dict) else {} for value in values]


def _json_line(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _open(config: HubConfig) -> Any:
    """A mapping from split to rows, or the rows of a source that knows no splits."""
    import datasets
    import pyarrow.parquet

    path = Path(config.path)
    if path.suffix in FILE_SUFFIXES:
        require(path.is_file(), f"data.path={path}: no such file; give a file, a folder or a hub name")
        if path.suffix in JSON_SUFFIXES:
            return _json_rows(path)
        # Not through the builder, which would write a second copy of the file to the cache.
        return datasets.Dataset(pyarrow.parquet.read_table(path))
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(config.path, config.subset)


def _rows(config: HubConfig, name: str) -> Sequence[Row]:
    try:
        source = _open(config)
    except ConfigError:
        raise
    except Exception as error:  # files and networks fail in many ways; the message must be one line
        cause = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"data.path={config.path}: cannot be read ({type(error).__name__}: {cause});"
            " check the name, data.subset and the network"
        ) from error
    if not isinstance(source, dict):
        require(
            name == "train", f"data.*_split={name}: {config.path} has no named splits; set it to null to hold rows out"
        )
        return source
    require(name in source, f"data.*_split={name}: not in {config.path}; choose from {', '.join(source)}")
    return source[name]


def _column_names(rows: Any) -> list[str]:
    if hasattr(rows, "column_names"):
        return list(rows.column_names)
    return sorted({name for row in rows for name in row})


def _check_columns(config: HubConfig, rows: Sequence[Row]) -> None:
    names = _column_names(rows)
    for path, key in config.columns().items():
        column = path.split(".")[0]
        require(
            path in names or column in names,
            f"{key}={path}: {config.path} has no column {column!r}; its columns are {', '.join(names)}",
        )


def _value(row: Row, path: str) -> Any:
    """The non-empty value at a dotted path."""
    value: Any = row.get(path)
    if value is None:
        value = row
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    is_empty = not value.strip() if isinstance(value, str) else isinstance(value, (list, dict)) and not value
    if value is None or is_empty:
        raise BadRow(f"empty {path}")
    return value


def _choices(row: Row, path: str) -> dict[str, str]:
    options = _value(row, path)
    if not isinstance(options, Mapping):
        options = {chr(ord("A") + i): option for i, option in enumerate(options)}
    return {str(letter): str(text) for letter, text in options.items() if text is not None}


def _answer(row: Row, config: HubConfig) -> str:
    text = str(_value(row, config.answer))
    if config.answer_boxed:
        answer = last_boxed(text)
    elif config.answer_pattern is not None:
        matches = list(re.finditer(config.answer_pattern, text))
        answer = matches[-1].group(1) if matches else None
    else:
        answer = text
    if answer is None or not answer.strip():
        raise BadRow(f"no answer in {config.answer}")
    return answer.strip()


def _messages(row: Row, path: str) -> list[dict[str, str]]:
    messages = _value(row, path)
    if isinstance(messages, str) or not all(
        isinstance(one, Mapping) and {"role", "content"} <= set(one) for one in messages
    ):
        raise BadRow(f"{path} is no list of messages with role and content")
    return [{"role": str(one["role"]), "content": str(one["content"])} for one in messages]


def _problem(row: Row, row_id: str, config: HubConfig) -> Problem:
    meta: dict[str, Any] = {name: _value(row, path) for name, path in config.meta.items()}
    if config.choices is not None:
        meta[CHOICES] = _choices(row, config.choices)

    def fill(match: re.Match[str]) -> str:
        if match[1] == CHOICES and config.choices is not None:
            return "\n".join(f"({letter}) {text}" for letter, text in meta[CHOICES].items())
        return str(_value(row, match[1]))

    if config.messages is not None:
        prompt: Any = _messages(row, config.messages)
    else:
        prompt = PLACEHOLDER.sub(fill, config.prompt or "")
    return Problem(id=row_id, prompt=prompt, answer=_answer(row, config), meta=meta)


def _identified(rows: Iterable[Row], config: HubConfig, name: str) -> Iterator[tuple[str, Row]]:
    """Each row with its id: the mapped column, or split and row number (from 0) where there is none."""
    for number, row in enumerate(rows):
        try:
            yield (f"{name}-{number}" if config.id is None else str(_value(row, config.id))), row
        except BadRow:
            yield f"{name}-{number} (no {config.id})", {}


def _share(row_id: str) -> float:
    """A fixed uniform number of an id."""
    return int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=8).digest(), "little") / 2**64


def _membership(config: HubConfig, split: str) -> Callable[[str], bool]:
    """Whether a row of the chosen source split belongs to ``split``."""
    test_share = config.holdout if config.test_split is None else 0.0
    validation_share = config.holdout if config.validation_split is None else 0.0
    bounds = {"test": (0.0, test_share), "validation": (test_share, test_share + validation_share)}
    if split == "train":
        bounds["train"] = (test_share + validation_share, 1.0)
    elif getattr(config, f"{split}_split") is not None:
        bounds[split] = (0.0, 1.0)
    low, high = bounds[split]
    return lambda row_id: low <= _share(row_id) < high


def _select(identified: Iterable[tuple[str, Row]], config: HubConfig, belongs: Callable[[str], bool]) -> HubProblems:
    problems: list[Problem] = []
    left_out: list[LeftOut] = []
    times_seen: Counter[str] = Counter()
    for row_id, row in identified:
        if config.limit is not None and len(problems) == config.limit:
            break
        if not belongs(row_id):
            continue
        times_seen[row_id] += 1
        if times_seen[row_id] > 1:
            continue
        try:
            problems.append(_problem(row, row_id, config))
        except BadRow as error:
            left_out.append(LeftOut(id=row_id, reason=str(error)))
    repeated = [LeftOut(id=row_id, reason="repeated id") for row_id, times in times_seen.items() if times > 1]
    return HubProblems(problems, left_out + repeated)


def _reasons(left_out: Sequence[LeftOut]) -> str:
    by_reason: dict[str, list[str]] = {}
    for row in left_out:
        by_reason.setdefault(row.reason, []).append(row.id)
    return "; ".join(
        f"{len(ids)} {reason} ({', '.join(ids[:IDS_IN_WARNING])}{', …' if len(ids) > IDS_IN_WARNING else ''})"
        for reason, ids in by_reason.items()
    )


@register("data", "hub", HubConfig)
def hub(config: HubConfig, split: str) -> HubProblems:
    """The problems of ``split`` (train, validation or test). Rows that cannot be one are logged and left out.

    Bad: an empty or missing field, an answer that does not parse, an id seen before (listed once). ConfigError if a
    mapped column does not exist, if the source cannot be read, or if no row is left.
    """
    require(split in ("train", "validation", "test"), f"split={split}: unknown; choose train, validation or test")
    name = getattr(config, f"{split}_split") or config.train_split
    rows = _rows(config, name)
    if len(rows):
        _check_columns(config, rows)
    found = _select(_identified(rows, config, name), config, _membership(config, split))
    reasons = _reasons(found.left_out)
    require(
        len(found) > 0,
        f"data.path={config.path}: no usable row for {split} among {len(rows)}: "
        + (reasons or f"none falls to it; raise data.holdout or name data.{split}_split"),
    )
    if reasons:
        log.warning("%s %s: %d rows kept, left out: %s", config.path, split, len(found), reasons)
    return found
