"""Metrics as (sum, count) until one reduction over micro-batches and ranks; then the writers: console, JSONL, wandb."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rltrain.config import TrackingConfig
from rltrain.runtime import dist
from rltrain.types import Mean, Metric, Metrics, Std

log = logging.getLogger(__name__)


class Accumulator:
    """Collects the metrics of one step and reduces them once."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}
        self.timing_s: dict[str, float] = {}

    def add(self, metrics: Metrics) -> None:
        """Merge, by the rule of each metric's kind."""
        for name, metric in metrics.items():
            known = self._metrics.get(name)
            self._metrics[name] = metric if known is None else known + metric  # type: ignore[operator]

    def replace(self, name: str, metric: Metric) -> None:
        """Put this metric in the place of what was added under its name."""
        self._metrics[name] = metric

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall-clock seconds of the block to ``timing_s/<stage>``."""
        start = time.perf_counter()
        yield
        self.timing_s[stage] = self.timing_s.get(stage, 0.0) + time.perf_counter() - start

    def reduce(self) -> dict[str, float]:
        """One number per metric, over all ranks; a metric with nothing in it is left out."""
        merged = Accumulator()
        for metrics in dist.gather_objects(self._metrics, name="metrics of the step"):
            merged.add(metrics)
        values = {name: _value(metric) for name, metric in sorted(merged._metrics.items())}
        timing = {f"timing_s/{stage}": seconds for stage, seconds in self.timing_s.items()}
        return {name: value for name, value in values.items() if value is not None} | timing


def _value(metric: Metric) -> float | None:
    if isinstance(metric, (Mean, Std)) and not metric.count:
        return None
    return metric.total / metric.count if isinstance(metric, Mean) else metric.value


class JsonlWriter:
    """``metrics.jsonl``: one line per step. A resumed run first drops the lines that it will write again."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_jsonl(path) if line["step"] <= resume_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append and flush; non-finite numbers become null, which JSON can hold."""
        clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **clean}) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a line torn by a kill is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s: a torn line was left out", path)
    return lines


class WandbWriter:
    """wandb beside the files, system metrics included. Any failure of it is one warning, never the end of a run.

    A resumed run goes on in the same wandb run. Steps that it does again have the same values; wandb keeps the first.
    """

    def __init__(self, config: TrackingConfig, *, run_dir: Path, name: str, run_config: Mapping[str, Any]) -> None:
        self._run: Any = None
        self._table: Any = None
        self._ended = run_dir / "wandb_step.txt"  # the last step before a regular end
        self._step = int(self._ended.read_text()) if self._ended.exists() else -1
        mode = wandb_mode(config.wandb)
        if mode == "disabled":
            return
        with self._guarded("start"):
            import wandb

            run_dir.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                mode=mode,  # type: ignore[arg-type]
                project=config.project,
                entity=config.entity,
                group=config.group,
                job_type="train",
                name=name,
                id=_run_id(run_dir),
                resume="allow",
                allow_val_change=True,  # a resumed run may have another folder, or more steps
                dir=str(run_dir),
                config=dict(run_config),
                settings=wandb.Settings(init_timeout=60, silent=True),
            )
            # The runs table shows the last value of everything; of accuracy the best one, too.
            self._run.define_metric("eval_accuracy", summary="last,max")

    def catch_up(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Log the steps again that an end by force has cost: wandb writes in blocks, from a process of its own, which a
        batch system ends first. wandb leaves out those it has."""
        for line in lines:
            if line["step"] > self._step:
                self.write(line["step"], {name: value for name, value in line.items() if name != "step"})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log one step."""
        if self._run is not None:
            with self._guarded("log"):
                self._run.log(dict(values), step=step)
                self._step = step

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to the ``completions`` table, which grows over the run."""
        if self._run is None or not rows:
            return
        with self._guarded("log samples"):
            import wandb

            if self._table is None:
                self._table = wandb.Table(columns=list(rows[0]), log_mode="INCREMENTAL")
            for row in rows:
                self._table.add_data(*row.values())
            self._run.log({"completions": self._table}, step=step)

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            with self._guarded("finish"):
                self._run.finish()
                self._ended.write_text(str(self._step))

    @contextmanager
    def _guarded(self, action: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # wandb is outside: whatever it raises must not end the run
            log.warning("wandb could not %s (%s); the run goes on without it", action, str(error).split("\n")[0])
            self._run = None


def wandb_mode(requested: str) -> str:
    """``auto`` becomes online with an API key, else offline."""
    if requested != "auto":
        return requested
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


def _run_id(run_dir: Path) -> str:
    """A stable id per run folder, so that a resumed run goes on in the same wandb run."""
    path = run_dir / "wandb_id.txt"
    if not path.exists():
        path.write_text(os.urandom(4).hex())
    return path.read_text().strip()
