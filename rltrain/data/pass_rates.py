"""Measured pass rates of training problems: the file, and the filter that reads it.

A JSONL file. Its first line says what was measured; each further line is a problem: ``index`` in the training split,
``id``, ``right`` and ``judged`` completions.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from rltrain.config import DataConfig
from rltrain.data.handbook import problems_of
from rltrain.data.mixture import Mixture
from rltrain.errors import ConfigError, require
from rltrain.types import Problem

log = logging.getLogger(__name__)

HASHED = 256  # problems, from all over the data, that a fingerprint reads
MEASURE = "measure this one: rltrain pass_rates"


@dataclass(frozen=True, kw_only=True)
class PassRate:
    """How many of a problem's judged completions were right. ``rate`` is None where none was judged."""

    index: int
    id: str
    right: int
    judged: int

    @property
    def rate(self) -> float | None:
        return self.right / self.judged if self.judged else None


@dataclass(frozen=True, kw_only=True)
class PassRates:
    """A file: what was measured, as plain data with the data set's fingerprint under ``data``, and the problems."""

    header: Mapping[str, Any]
    rows: tuple[PassRate, ...]


class SomeProblems(Sequence[Problem]):
    """The problems at ``indices`` of a data set, made when they are asked for."""

    def __init__(self, problems: Sequence[Problem], indices: Sequence[int]) -> None:
        self._problems, self.indices = problems, tuple(indices)

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self._problems[each] for each in self.indices[index]]
        return self._problems[self.indices[index]]


def fingerprint(problems: Sequence[Problem]) -> str:
    """``COUNT-HASH``: of the ids, prompts and answers of up to HASHED problems from all over the data.

    The place of the data does not count, so that a file that was moved or renamed is the same data set.
    """
    digest = hashlib.sha256()
    for index in range(0, len(problems), max(1, len(problems) // HASHED)):
        problem = problems[index]
        messages = problem.prompt if isinstance(problem.prompt, str) else [dict(each) for each in problem.prompt]
        digest.update(json.dumps([problem.id, messages, problem.answer], default=str).encode())
    return f"{len(problems)}-{digest.hexdigest()[:16]}"


def read(path: Path, key: str) -> PassRates:
    """The whole lines of a file; a last line that a killed process tore is left out.

    ConfigError, under the name of the setting ``key``, for a file that is not there or not of this kind.
    """
    try:
        whole, _, _ = path.read_bytes().rpartition(b"\n")
        first, *others = [json.loads(line) for line in whole.decode().splitlines()] or [{}]
        rows = tuple(PassRate(**each) for each in others)
    except OSError as error:
        raise ConfigError(f"{key}={path}: cannot be read ({error.strerror}); {MEASURE} writes it") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}={path}: is no file of pass rates ({error}); {MEASURE} writes it") from None
    require(isinstance(first, dict) and "data" in first, f"{key}={path}: is no file of pass rates; {MEASURE} writes it")
    return PassRates(header=first, rows=rows)


def within(problems: Sequence[Problem], config: DataConfig, key: str = "data") -> Sequence[Problem]:
    """The problems whose pass rate lies in [low, high]; all where no filter is set.

    Problems without a rate are left out and counted in a warning. ConfigError for the rates of another data set, and
    where no problem is left.
    """
    if config.pass_rate is None or config.pass_rate_file is None:
        return problems
    setting, (low, high) = f"{key}.pass_rate_file", config.pass_rate
    measured = read(Path(config.pass_rate_file).expanduser(), setting)
    here = fingerprint(problems)
    require(
        measured.header["data"] == here,
        f"{setting}={config.pass_rate_file}: rates of another data set ({measured.header['data']}, not {here}: count "
        f"and hash of the training problems); {MEASURE}",
    )
    rates = [row.rate for row in measured.rows if row.rate is not None]
    kept = [row.index for row in measured.rows if row.rate is not None and low <= row.rate <= high]
    spread = f"they lie in {min(rates):g}..{max(rates):g}" if rates else "the file has none"
    require(bool(kept), f"{key}.pass_rate=[{low:g}, {high:g}]: no problem has such a rate, {spread}; widen the bounds")
    log.info("%s.pass_rate: %d of %d problems have a rate in [%g, %g]", key, len(kept), len(rates), low, high)
    if missing := len(problems) - len(rates):
        log.warning("%s: %d of %d problems have no pass rate and are left out", setting, missing, len(problems))
    return SomeProblems(problems, sorted(kept))


def training_problems(config: DataConfig) -> Sequence[Problem]:
    """The training split that RL draws from, by the filter of each data set."""
    problems = problems_of(config, "train")
    if not isinstance(problems, Mixture):
        return within(problems, config)
    return problems.mapped(lambda name, source: within(source, problems.configs[name], f"data.sources.{name}"))
