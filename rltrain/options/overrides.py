"""A command line before Hydra reads it: choices made twice, and text that Hydra's grammar reads otherwise."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rltrain.errors import ConfigError
from rltrain.options import keys
from rltrain.registry import parts

log = logging.getLogger(__name__)

# Parts that a run may be without, and how each is chosen.
OPTIONAL = {"environment": "environment", "eval_data": "+data@eval_data", "cold_start_data": "+data@cold_start_data"}


def split(override: str) -> tuple[str, str | None]:
    """``+key=value`` as key, without its sign, and value; the value is None where there is no ``=``."""
    key, equal, value = override.partition("=")
    return key.lstrip("+~").strip(), value if equal else None


def check(overrides: Sequence[str], *, folders: Sequence[Path], multirun: bool = False) -> None:
    """Refuse what no config can be made of, before Hydra does in words of its grammar. ``folders`` hold YAML."""
    groups = _groups(folders)
    for override in overrides:
        _check_form(override)
        if not multirun:
            _check_readable(override, groups)
    _check_twice(overrides, groups)


def _groups(folders: Sequence[Path]) -> set[str]:
    """The names of the groups of choices: registered, or folders of YAML."""
    below = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()}
    return below | {part.group for part in parts()}


def _check_form(override: str) -> None:
    key, value = split(override)
    if value is None and not override.startswith("~"):
        hint = f"{key.replace(':', '=', 1)}" if ":" in key else f"{key}=VALUE"
        raise ConfigError(f"{override}: not of the form key=value; write {hint}")
    if not key or key.startswith("-") or " " in key:
        shown = f"{key.lstrip('- ')}={value}" if key.lstrip("- ") else "key=value"
        raise ConfigError(f"{override}: not of the form key=value; write {shown}")


def _check_twice(overrides: Sequence[str], groups: set[str]) -> None:
    """A group that is chosen twice is an error; of a key that is set twice the last value counts, with a warning."""
    seen: dict[str, str] = {}
    for override in overrides:
        key, value = split(override)
        before = seen.get(key)
        if value is not None and before is not None and before != value:
            if key.partition("@")[0] in groups:
                raise ConfigError(f"{key}: chosen twice ({key}={before} and {key}={value}); keep the choice you mean")
            log.warning("%s: set twice, to %s and then to %s; the last counts", key, before, value)
        if value is not None:
            seen[key] = value


def _check_readable(override: str, groups: set[str]) -> None:
    """Refuse a value that Hydra's grammar cannot read, or reads as a list of runs to sweep over, or as no choice."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, value = split(override)
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        raise ConfigError(_must_be_quoted(key, value or "", "cannot be read as it stands")) from None
    if parsed.is_sweep_override():
        raise ConfigError(_must_be_quoted(key, value or "", "is read as several values"))
    if key.partition("@")[0] in groups and isinstance(parsed.value(), (bool, int, float, dict)):
        raise ConfigError(f"{key}={value}: not the name of a choice; rltrain list shows the choices")


def _must_be_quoted(key: str, value: str, cause: str) -> str:
    known = keys.known_keys().get(keys.pattern(key))
    listed = bool(known) and str(known.type).startswith("list")  # type: ignore[union-attr]
    remedy = shlex.quote(f"{key}=[{value}]") if listed and "[" not in value else quoted(key, value)
    return f"{key}: the value {value} {cause}; quote it: {remedy}"


def quoted(key: str, value: str) -> str:
    """The override as a shell needs it so that Hydra reads ``value`` as this text: ``'data.prompt="{question}"'``."""
    bare = next((value[1:-1] for mark in "\"'" if value[:1] == value[-1:] == mark and value.count(mark) == 2), value)
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', bare)  # a backslash counts double before a quote, and only there
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return shlex.quote(f'{key}="{escaped}"')


def check_chosen(overrides: Sequence[str], error: Exception) -> None:
    """Refuse a key of an optional part that is not chosen, where ``error`` is OmegaConf's about a key of nothing."""
    if "NoneType" in str(error):
        for key in (split(override)[0] for override in overrides):
            if (place := key.partition(".")[0]) in OPTIONAL and place != key:
                raise ConfigError(f"{key}: no {place} is chosen; choose it first: {OPTIONAL[place]}=NAME") from None


def check_texts(overrides: Sequence[str], composed: Any) -> None:
    """Refuse text that was read as a number or a truth value, or lost its blanks; ``model.revision=12e4567`` is inf.

    ``composed`` is the DictConfig that the overrides gave.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    for override in overrides:
        key, value = split(override)
        if not value or "@" in key or "/" in key or override.startswith("~"):
            continue
        read = OverridesParser.create().parse_override(override).value()
        known = keys.known_keys().get(keys.pattern(key))
        if known is None or known.type is not str or read is None:
            continue
        held = OmegaConf.select(composed, key)
        lost = isinstance(read, (bool, int, float)) or (isinstance(read, str) and value != value.strip())
        if lost and held != value:
            raise ConfigError(f"{key}: the text {value!r} is read as {held!r}; quote it: {quoted(key, value)}")
