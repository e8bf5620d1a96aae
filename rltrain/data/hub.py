"""Existing data sets: a hub name or folder through ``datasets``, or a file."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from rltrain.config import MISSING, DataConfig
from rltrain.data.boxed import last_boxed
from rltrain.data.columns import BadRow, Row, messages_at, options_at, require_option, text_of, value_at
from rltrain.data.files import BadLine, column_names, names_a_file, read_file
from rltrain.errors import ConfigError, require
from rltrain.registry import register
from rltrain.types import Problem

log = logging.getLogger(__name__)

PLACEHOLDER = re.compile(r"\{([A-Za-z_][\w.]*)\}")
BOX = re.compile(r"\{([^{}]+)\}")
CHOICES = "choices"
SPLITS = ("train", "validation", "test")
IDS_IN_WARNING = 5
REASONS_IN_WARNING = 8
RAW = "; as it is, for a trl_function: data.answer=null +data.meta.answer={path}"


@dataclass(kw_only=True)
class HubConfig(DataConfig):
    r"""Where the rows are, and which columns become a problem. A dot reaches into one: ``reward_model.ground_truth``.

    ``prompt`` is a template over columns, such as ``"{question}"``; ``{choices}`` stands for the options of column
    ``choices`` (a mapping from letter to text, a list, or ``[{key, value}]``), printed ``(A) text`` one a line.
    Alternatively ``messages`` names a column of chat messages; one that ends with the assistant is a bad row, or
    continued with ``continue_final_message``. ``answer_boxed`` takes the content of the answer's last ``\boxed{}``;
    ``answer_pattern`` the first group of a regex's last match; ``answer=null`` is for rewards that need no gold.
    ``meta`` maps names to columns, whose values rewards get as they are.

    A split without a name in the data (null) is a fixed share ``holdout`` of the training rows, chosen by hash of id.
    """

    path: str = MISSING  # hub name, folder, JSONL or parquet
    subset: str | None = None  # configuration of the data set
    train_split: str = "train"  # name of the training split
    validation_split: str | None = None  # null: a fixed share of the training rows
    test_split: str | None = None  # null: a fixed share of the training rows
    holdout: float = 0.05
    prompt: str | None = None
    messages: str | None = None
    continue_final_message: bool = False
    answer: str | None = "answer"
    answer_pattern: str | None = None
    answer_boxed: bool = False
    id: str | None = None  # column of ids; null: numbers
    choices: str | None = None
    meta: dict[str, str] = field(default_factory=dict)
    limit: int | None = None  # rows that are taken; null: all

    def __post_init__(self) -> None:
        require(
            (self.prompt is None) != (self.messages is None),
            "data.prompt, data.messages: exactly one makes the prompt; set a template or a column of messages",
        )
        require(
            self.prompt is None or PLACEHOLDER.search(self.prompt) is not None,
            f"data.prompt={self.prompt}: reads no column, so that all prompts would be alike; write a column in "
            "braces, {question}",
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
        require(
            not self.continue_final_message or self.messages is not None,
            "data.continue_final_message: has no effect on data.prompt; set data.messages, or leave it out",
        )
        require(
            self.answer is not None or not (self.answer_boxed or self.answer_pattern),
            "data.answer=null: nothing for data.answer_boxed or data.answer_pattern to read; unset them",
        )
        require(
            self.answer is None or self.answer not in PLACEHOLDER.findall(self.prompt or ""),
            f"data.prompt: {{{self.answer}}} is data.answer, so that the gold would stand in the prompt; take it out "
            "(an empty box is written \\boxed{})",
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


def _open(config: HubConfig) -> Any:
    """A mapping from split to rows, or the rows of a source that knows no splits."""
    import datasets

    path = Path(config.path).expanduser()
    if names_a_file(path):
        return read_file(path)
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") > 1
    require(
        path.is_dir() or not looks_local or "://" in config.path,
        f"data.path={config.path}: no such file or folder; give a file, a folder or a hub name",
    )
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(str(path) if path.is_dir() else config.path, config.subset)


def _rows(config: HubConfig, name: str) -> Sequence[Row | BadLine]:
    try:
        source = _open(config)
    except ConfigError:
        raise
    except Exception as error:  # files and networks fail in many ways; the message must be one line
        raise _unreadable(config, error, "check the name, data.subset and the network") from error
    if not isinstance(source, dict):
        require(
            name == "train", f"data.*_split={name}: {config.path} has no named splits; set it to null to hold rows out"
        )
        return source
    require(name in source, f"data.*_split={name}: not in {config.path}; choose from {', '.join(source)}")
    return source[name]


def _unreadable(config: HubConfig, error: Exception, remedy: str) -> ConfigError:
    cause = (str(error).splitlines() or [""])[0]
    return ConfigError(f"data.path={config.path}: cannot be read ({type(error).__name__}: {cause}); {remedy}")


def _check_columns(config: HubConfig, names: Sequence[str]) -> None:
    for path, key in config.columns().items():
        column = path.split(".")[0]
        require(
            path in names or column in names,
            f"{key}={path}: {config.path} has no column {column!r}; its columns are {', '.join(names)}",
        )
    for box in BOX.finditer(config.prompt or ""):
        require(
            box[1] not in names or PLACEHOLDER.fullmatch(box[0]) is not None,
            f"data.prompt: {box[0]} is not read, the name has other characters than letters, digits, _ and dots, or "
            "begins with a digit or dot; rename the column",
        )


def _mapped_columns(config: HubConfig, rows: Sequence[Row | BadLine]) -> Sequence[Row | BadLine]:
    """A table without the columns that are not read, which may be images, as plain Python values."""
    if not hasattr(rows, "select_columns"):
        return rows
    names = column_names(rows)
    used = [name for name in names if any(name in (path, path.split(".")[0]) for path in config.columns())]
    return rows.select_columns(used).with_format(None)  # type: ignore[attr-defined]


def _answer(row: Row, config: HubConfig) -> str:
    if config.answer is None:
        return ""
    path = config.answer
    text = text_of(value_at(row, path), path, instead=RAW.format(path=path))
    if config.answer_boxed:
        answer = last_boxed(text)
    elif config.answer_pattern is not None:
        matches = list(re.finditer(config.answer_pattern, text))
        answer = matches[-1].group(1) if matches else None
    else:
        answer = text
    if answer is None or not answer.strip():
        raise BadRow(f"no answer in {path}")
    return answer.strip()


def _problem(row: Row, row_id: str, config: HubConfig) -> Problem:
    meta: dict[str, Any] = {name: value_at(row, path) for name, path in config.meta.items()}
    if config.choices is not None:
        meta[CHOICES] = options_at(row, config.choices)

    def fill(match: re.Match[str]) -> str:
        if match[1] == CHOICES and config.choices is not None:
            return "\n".join(f"({letter}) {text}" for letter, text in meta[CHOICES].items())
        return text_of(value_at(row, match[1]), match[1])

    if config.messages is not None:
        prompt: Any = messages_at(row, config.messages, continued=config.continue_final_message)
    else:
        prompt = PLACEHOLDER.sub(fill, config.prompt or "")
    answer = _answer(row, config)
    if config.choices is not None and config.answer is not None:
        require_option(answer, meta[CHOICES], config.answer)
    return Problem(id=row_id, prompt=prompt, answer=answer, meta=meta)


def _identified(rows: Sequence[Row | BadLine], config: HubConfig, name: str) -> Iterator[tuple[str, Row | BadLine]]:
    """Each row with its id: the mapped column, or split and row number (from 0) where there is none."""
    for number, row in enumerate(_iterated(rows, config)):
        try:
            yield _row_id(row, number, config, name), row
        except BadRow as error:  # it belongs to no split, and counts for every one
            yield f"{name}-{number} (no {config.id})", BadLine(line=number, reason=str(error))


def _iterated(rows: Sequence[Row | BadLine], config: HubConfig) -> Iterator[Row | BadLine]:
    try:
        yield from rows
    except Exception as error:  # of the source alone: what is done with a row is not inside
        raise _unreadable(config, error, "mend the data") from error


def _row_id(row: Row | BadLine, number: int, config: HubConfig, name: str) -> str:
    if isinstance(row, BadLine):
        return f"line {row.line}"
    return f"{name}-{number}" if config.id is None else text_of(value_at(row, config.id), config.id)


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


def _select(
    identified: Iterable[tuple[str, Row | BadLine]], config: HubConfig, belongs: Callable[[str], bool]
) -> HubProblems:
    problems: list[Problem] = []
    left_out: list[LeftOut] = []
    times_seen: Counter[str] = Counter()
    for row_id, row in identified:
        if config.limit is not None and len(problems) == config.limit:
            break
        if isinstance(row, BadLine):
            left_out.append(LeftOut(id=row_id, reason=row.reason))
            continue
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
    told = [f"{len(ids)} row{'s' * (len(ids) > 1)} ({_first(ids)}): {why}" for why, ids in by_reason.items()]
    return "; ".join(told[:REASONS_IN_WARNING]) + f"; {len(told)} reasons in all" * (len(told) > REASONS_IN_WARNING)


def _first(ids: Sequence[str]) -> str:
    shown = [name if name.isprintable() else ascii(name) for name in ids[:IDS_IN_WARNING]]
    return ", ".join(shown) + ", …" * (len(ids) > IDS_IN_WARNING)


@register("data", "hub", HubConfig)
def hub(config: HubConfig, split: str) -> HubProblems:
    """The problems of ``split`` (train, validation or test). Rows that cannot be one are logged and left out.

    Bad: an empty or missing field, a value that is no text where text is needed, an answer that does not parse, an id
    seen before (listed once); a line of the file that is no row counts for every split. ConfigError if a mapped column
    does not exist, if the source cannot be read or holds nothing, or if no row is left.
    """
    require(split in SPLITS, f"split={split}: unknown; choose train, validation or test")
    name = getattr(config, f"{split}_split") or config.train_split
    rows = _rows(config, name)
    require(len(rows) > 0, f"data.path={config.path}: holds no row; give a file with at least one")
    if names := column_names(rows):  # none where every line is bad
        _check_columns(config, names)
    found = _select(_identified(_mapped_columns(config, rows), config, name), config, _membership(config, split))
    reasons = _reasons(found.left_out)
    require(
        len(found) > 0,
        f"data.path={config.path}: no usable row for {split} among {len(rows)}: "
        + (reasons or f"none falls to it; raise data.holdout or name data.{split}_split"),
    )
    if reasons:
        count = len(found.left_out)
        log.warning("%s %s: %d rows kept, %d left out: %s", config.path, split, len(found), count, reasons)
    return found
