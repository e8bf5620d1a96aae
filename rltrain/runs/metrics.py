"""Metrics as (sum, count) until one reduction over micro-batches and ranks, and the file ``metrics.jsonl``."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rltrain.runtime import dist
from rltrain.types import Mean, Metric, Metrics, Std

log = logging.getLogger(__name__)


class Accumulator:
    """Collects the metrics of one step and reduces them once."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}
        self.timing_s: dict[str, float] = {}

    def add(self, metrics: Metrics) -> None:
        """Merge metrics of equal names, by the rule of their kind."""
        for name, metric in metrics.items():
            known = self._metrics.get(name)
            self._metrics[name] = metric if known is None else known + metric  # type: ignore[operator]

    def replace(self, name: str, metric: Metric) -> None:
        """Replace what was added under this name."""
        self._metrics[name] = metric

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall-clock seconds of the block to ``timing_s/<stage>``."""
        start = time.perf_counter()
        yield
        self.timing_s[stage] = self.timing_s.get(stage, 0.0) + time.perf_counter() - start

    def reduce(self) -> dict[str, float]:
        """One number per metric, over all ranks. A metric of zero count is left out."""
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
        """Append and flush. Non-finite numbers become null, which JSON can hold."""
        clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **clean}) + "\n")


RENAMED = {"entropy": "entropy/trained"}  # metrics of runs of before, by the names of now


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file, by the names of now. A line that a killed process tore is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(_by_new_names(json.loads(line)))
        except json.JSONDecodeError:
            log.warning("%s: a torn line was left out", path)
    return lines


def _by_new_names(row: Any) -> Any:
    return {RENAMED.get(name, name): value for name, value in row.items()} if isinstance(row, dict) else row


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of a share, at 95 %.

    (p + z²/2n ± z·sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n), z = 1.959964.
    """
    z = 1.959964
    spread = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    middle, scale = share + z**2 / (2 * count), 1 + z**2 / count
    return (middle - spread) / scale, (middle + spread) / scale
