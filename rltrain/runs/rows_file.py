"""JSON lines that a killed command goes on with, and the record of the config that made them."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from rltrain.config import RunConfig
from rltrain.errors import ConfigError
from rltrain.runs import run_folder

JsonRow = dict[str, Any]


def read_rows(path: Path) -> list[JsonRow]:
    """The rows of an earlier run. An incomplete last line of a killed run is removed from the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def append_rows(path: Path, rows: Iterable[JsonRow]) -> None:
    """Append and sync, so that a killed run loses at most the current batch."""
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all."""
    writing = path.with_name(f".writing_{path.name}")
    writing.write_text(text, encoding="utf-8")
    writing.replace(path)


def refuse_other_config(path: Path, config: RunConfig, *, free_keys: Collection[str]) -> None:
    """ConfigError if the record at ``path`` is of another config, but for ``free_keys``."""
    if not path.exists():
        return
    before = run_folder.with_new_keys(json.loads(path.read_text())["config"], config)
    if changed := run_folder.changes(before, run_folder.resolved(config), ignored=tuple(free_keys)):
        raise ConfigError(f"{path}: made with another config ({changed}); restore these keys or set another run_dir")
