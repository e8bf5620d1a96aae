"""The command of a run, and the difference of its config from the preset that it names."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rltrain import cli
from rltrain.errors import ConfigError
from rltrain.report.folder import RecordedRun
from rltrain.runs import run_folder

ABSENT = "—"


@dataclass(frozen=True, kw_only=True)
class ConfigDifference:
    """A key of the resolved config, as the preset has it and as the run has it."""

    key: str
    preset: str
    run: str


@dataclass(frozen=True, kw_only=True)
class Origin:
    """``preset`` names what the config is compared with. ``remark`` says why there is no comparison."""

    command: str
    preset: str
    differences: Sequence[ConfigDifference]
    remark: str = ""


def origin(run: RecordedRun) -> Origin:
    """From ``run.json`` and ``config.yaml``."""
    arguments = [str(argument) for argument in run.provenance.get("command") or []]
    command = f"python {shlex.join(arguments[1:])}".rstrip() if arguments else ""
    chosen = [argument for argument in arguments if argument.lstrip("+").startswith("experiment=")]
    preset = chosen[0].lstrip("+") if chosen else "the defaults (configs/config.yaml)"
    if not run.config:
        return Origin(command=command, preset=preset, differences=[], remark="the run has no readable config.yaml")
    try:
        expected = _resolved(*(f"+{argument.lstrip('+')}" for argument in chosen))
    except ConfigError as error:
        return Origin(command=command, preset=preset, differences=[], remark=str(error))
    return Origin(command=command, preset=preset, differences=preset_differences(expected, run.config))


@cache
def _resolved(*overrides: str) -> Mapping[str, Any]:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        return run_folder.resolved(cli.compose(list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{' '.join(overrides)} cannot be composed here ({cli.one_line(error)})") from error


def preset_differences(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> list[ConfigDifference]:
    """Key by key, with a dash for a missing value. Of an exchanged part, only the run's settings are listed."""
    differing = run_folder.differences(expected, actual)
    exchanged = tuple(f"{key.removesuffix('.kind')}." for key in differing if key.endswith(".kind"))
    return [
        ConfigDifference(key=key, preset=_text(old), run=_text(new))
        for key, (old, new) in differing.items()
        if not (new is None and key.startswith(exchanged))
    ]


def _text(value: Any) -> str:
    """The value as text, in quotes if it begins or ends with a blank."""
    if isinstance(value, str) and value != value.strip():
        return repr(value)
    return ABSENT if value is None else str(value)
