"""Run folders as curves: a metric against completions drawn and against seconds of training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from rltrain.errors import ConfigError
from rltrain.runs.metrics import read_jsonl
from rltrain.runs.summary import series


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One run. The points are the steps at which the metric was recorded. ``started``: step 0 is a point.

    ``completions`` counts those drawn up to the point, also those that dynamic sampling dropped. ``seconds`` is the
    time of the training steps, without evaluation, saving and cold start.
    """

    folder: Path
    method: str
    task: str
    seed: int
    completions: np.ndarray
    seconds: np.ndarray
    values: np.ndarray
    started: bool = True
    step_s: float | None = None
    length_tokens: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    def points(self, axis: str) -> np.ndarray:
        """The coordinates of the points on ``axis``: completions or seconds."""
        return {"completions": self.completions, "seconds": self.seconds}[axis]

    def at(self, axis: str, x: float | np.ndarray) -> np.ndarray:
        """The metric at ``x`` of ``axis``, on straight lines between the points."""
        return np.asarray(np.interp(x, self.points(axis), self.values))

    def completions_to(self, level: float, *, falling: bool = False) -> float | None:
        """The completions at which the lines first reach ``level`` from below (or above, if ``falling``), or None."""
        sign = -1 if falling else 1
        reached = np.flatnonzero(sign * self.values >= sign * level)
        if not len(reached):
            return None
        last = int(reached[0])
        points = slice(max(0, last - 1), last + 1)
        return float(np.interp(sign * level, sign * self.values[points], self.completions[points]))


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The curves to compare, and a note on each folder without one."""

    curves: Sequence[Curve]
    notes: Sequence[str]


def read(
    paths: Iterable[Path], *, by: Sequence[str], metric: str, task: Sequence[str] = (), partial: bool = False
) -> Reading:
    """Read run folders, and folders of run folders. Unfinished runs are left out unless ``partial``."""
    curves: dict[tuple[str, str, int], Curve] = {}
    notes = []
    for path in paths:
        folders = run_folders(path)
        notes += [] if folders else [f"{path}: holds no run (no config.yaml)"]
        for folder in folders:
            curve = read_curve(folder, by=by, metric=metric, task=task, partial=partial)
            if isinstance(curve, str):
                notes.append(f"{folder}: left out, {curve}")
                continue
            key = (curve.method, curve.task, curve.seed)
            if key in curves:
                notes.append(f"{folder}: left out, {curves[key].folder} is the same method and seed")
            curves.setdefault(key, curve)
    return Reading(curves=list(curves.values()), notes=notes)


def run_folders(path: Path) -> list[Path]:
    """The folder itself if it is a run folder, else the run folders below it."""
    if (path / "config.yaml").exists() or (path / "metrics.jsonl").exists():
        return [path]
    return sorted(file.parent for file in path.glob("**/config.yaml"))


def read_curve(folder: Path, *, by: Sequence[str], metric: str, task: Sequence[str], partial: bool) -> Curve | str:
    """The curve of a run, or the reason why there is none."""
    import yaml

    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        rows = read_jsonl(folder / "metrics.jsonl")
        steps, values = series(rows, metric)
        last_step = max((row["step"] for row in rows), default=0)
        seed, planned, batch = config["seed"], config["steps"], config["batch"]
        drawn = batch["prompts_per_step"] * batch["group_size"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})"
    if last_step < planned and not partial:
        return f"stands at step {last_step} of {planned} (--partial keeps it)"
    if len(values) < 2:
        return f"{metric} was recorded {len(values)} times, a curve needs two"
    training = [row for row in rows if row["step"] > 0]
    attempts = [row.get("dynamic_sampling/attempts") or 1.0 for row in training]
    seconds = [(row.get("timing_s/step") or 0.0) - (row.get("timing_s/checkpoint") or 0.0) for row in training]
    ends = [row["step"] for row in training]
    return Curve(
        folder=folder,
        method=label(config, by),
        task=label(config, task),
        seed=seed,
        completions=_up_to(steps, ends, np.multiply(attempts, drawn)),
        seconds=_up_to(steps, ends, np.array(seconds)),
        values=np.array(values, dtype=float),
        started=steps[0] == 0,
        step_s=float(np.median(seconds)) if seconds else None,
        length_tokens=_last(rows, "eval_completions/mean_length", "completions/mean_length"),
        config=config,
    )


def _up_to(steps: Sequence[int], ends: Sequence[int], amounts: np.ndarray) -> np.ndarray:
    """Cumulative sums of ``amounts`` at ``steps``. Amount i was spent in the step that ends at ``ends[i]``."""
    total = np.concatenate([[0.0], np.cumsum(amounts)])
    return total[np.searchsorted(np.array(ends), np.array(steps), side="right")]


def _last(rows: Sequence[Mapping[str, Any]], *names: str) -> float | None:
    recorded = (series(rows, name)[1] for name in names)
    return next((values[-1] for values in recorded if values), None)


def label(config: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The values of dotted ``keys``. A part, such as an estimator, is given by its name."""
    return "/".join(_value(config, key) for key in keys)


def _value(config: Mapping[str, Any], key: str) -> str:
    try:
        value = reduce(lambda tree, name: tree[name], key.split("."), config)
    except (KeyError, TypeError):
        hint = " (the presets of algorithm= set advantage and loss; name= tells them apart)" * (key == "algorithm")
        raise ConfigError(f"{key}: not a key of config.yaml{hint}; choose one of {', '.join(config)}") from None
    value = value.get("kind", value) if isinstance(value, Mapping) else value
    if isinstance(value, Mapping):
        raise ConfigError(f"{key}: holds several keys; choose one of {', '.join(f'{key}.{name}' for name in value)}")
    return str(value)


def common_folder(curves: Sequence[Curve]) -> Path:
    """The folder that holds all runs."""
    return Path(os.path.commonpath([curve.folder.resolve().parent for curve in curves]))
