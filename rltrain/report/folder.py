"""A run folder as read from disk. What is missing, torn or unreadable becomes a note, never an error."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from rltrain.config import RunConfig
from rltrain.runs.metrics import read_jsonl
from rltrain.runs.summary import MetricRows, series

T = TypeVar("T")
TRAINING, HELD_OUT = "step_", "eval_step_"


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """The recorded files of a run. ``notes`` name what is missing."""

    path: Path
    label: str
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    rows: MetricRows
    notes: list[str] = field(default_factory=list)

    @property
    def steps_done(self) -> int:
        return max((row["step"] for row in self.rows), default=0)

    def part(self, group: str) -> Mapping[str, Any]:
        """A part's settings with its name as ``kind``, empty where the config has none."""
        value = self.config.get(group)
        return value if isinstance(value, Mapping) else {}

    def sampled_steps(self, prefix: str = TRAINING) -> list[int]:
        """The steps with a file of samples."""
        stems = [path.stem.removeprefix(prefix) for path in (self.path / "samples").glob(f"{prefix}*.parquet")]
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def samples(self, step: int, prefix: str = TRAINING) -> list[dict[str, Any]]:
        """The rows of a step's samples, empty with a note where the file cannot be read."""
        path = self.path / "samples" / f"{prefix}{step:06d}.parquet"
        return _attempt(lambda: _read_parquet(path), [], self.notes, f"samples/{path.name}")


def read_run(path: Path, *, label: str) -> RecordedRun:
    """Read the files of a run folder."""
    notes: list[str] = []
    run = RecordedRun(
        path=path,
        label=label,
        config=_attempt(lambda: _read_yaml(path / "config.yaml"), {}, notes, "config.yaml"),
        provenance=_attempt(lambda: _read_json(path / "run.json"), {}, notes, "run.json"),
        rows=_attempt(lambda: _read_metrics(path / "metrics.jsonl", notes), [], notes, "metrics.jsonl"),
        notes=notes,
    )
    notes += _state(run)
    return run


def _attempt(read: Callable[[], T], otherwise: T, notes: list[str], name: str) -> T:
    import pyarrow as pa
    import yaml

    try:
        return read()
    except FileNotFoundError:
        notes.append(f"{name} is missing")
    except (OSError, ValueError, yaml.YAMLError, pa.ArrowException) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        notes.append(f"{name} cannot be read ({first[:200]}); it may be torn")
    return otherwise


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read().to_pylist()


def _read_json(path: Path) -> Mapping[str, Any]:
    return _mapping(json.loads(path.read_text()))


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    return _mapping(yaml.safe_load(path.read_text()))


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"it holds {type(value).__name__}, not keys and values")
    return value


def _read_metrics(path: Path, notes: list[str]) -> MetricRows:
    written = [line for line in path.read_text().splitlines() if line.strip()]
    rows = [row for row in read_jsonl(path) if isinstance(row, dict) and isinstance(row.get("step"), int)]
    if len(rows) < len(written):
        notes.append(f"metrics.jsonl: {len(written) - len(rows)} of {len(written)} lines are torn and were left out")
    return rows


def _state(run: RecordedRun) -> list[str]:
    """Notes on unfinished runs and interrupted saves."""
    notes = []
    absent = [entry.name for entry in fields(RunConfig) if entry.name not in run.config]
    if run.config and absent:
        notes.append(f"config.yaml lacks {', '.join(absent[:8])}: it is torn, or of an older version")
    planned = run.config.get("steps")
    if isinstance(planned, int) and run.rows and run.steps_done < planned:
        notes.append(f"{run.steps_done} of {planned} steps are recorded: the run goes on, or was interrupted")
    if not run.rows:
        notes.append("metrics.jsonl holds no step")
    notes += [
        f"checkpoints/{path.name}: a save was interrupted, or is under way"
        for path in sorted((run.path / "checkpoints").glob(".writing_*"))
    ]
    notes += [
        f"checkpoints/{path.name} has no manifest: it was never finished"
        for path in sorted((run.path / "checkpoints").glob("step_*"))
        if not (path / "manifest.json").exists()
    ]
    if not run.sampled_steps():
        notes.append("no samples are recorded (tracking.samples_every_steps), so no credit can be shown")
    if not series(run.rows, "eval_accuracy")[1]:
        notes.append("no held-out evaluation is recorded")
    return notes
