"""A page on a folder of runs: a row per run, with links to their reports."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rltrain.report import curves, page
from rltrain.report.folder import read_run
from rltrain.report.page import RunView
from rltrain.runs.summary import MetricRows, series

WIDTH, HEIGHT, EDGE = 100, 24, 3  # of the small line in a row
PARTS = ("data", "model", "advantage")


@dataclass(frozen=True, kw_only=True)
class IndexRow:
    """A run in the table. ``link`` leads to its report, ``points`` draw its held-out curve."""

    view: RunView
    link: str
    points: str

    @property
    def chosen(self) -> str:
        """The parts and the seed, which tell runs of an experiment apart."""
        named = [str(kind) for part in PARTS if (kind := self.view.run.part(part).get("kind"))]
        seed = self.view.run.config.get("seed")
        return ", ".join(named) + ("" if seed is None else f", seed {seed}")

    @property
    def is_evaluated_twice(self) -> bool:
        held_out = self.view.evaluation
        return held_out is not None and held_out.first_step != held_out.last_step

    @property
    def metric(self) -> str:
        """The metric of the row: held-out accuracy, or held-out reward where nothing can be right."""
        held_out = self.view.evaluation
        name = held_out.main.name if held_out and held_out.main else ""
        return curves.CURVES[name].title if name in curves.CURVES else name.replace("eval_", "held-out ")


def build(folders: Sequence[Path], reports: Sequence[Path], *, out: Path, title: str) -> str:
    """The HTML of the index at ``out``, of run folders and the files of their reports."""
    rows = [
        _row(folder, label, report, out)
        for folder, label, report in zip(folders, page.labels(folders), reports, strict=True)
    ]
    return page.template("index.html").render(
        title=title, rows=rows, style=page.asset("page.css"), width=WIDTH, height=HEIGHT
    )


def _row(folder: Path, label: str, report: Path, out: Path) -> IndexRow:
    view = page.view_of(read_run(folder, label=label))
    main = view.evaluation.main if view.evaluation else None
    link = Path(os.path.relpath(report.resolve(), out.resolve().parent)).as_posix()
    return IndexRow(view=view, link=link, points=small_line(view.run.rows, main.name) if main else "")


def small_line(rows: MetricRows, name: str) -> str:
    """The points of a metric as a line in a box of WIDTH x HEIGHT, from its lowest to its highest value."""
    steps, values = series(rows, name)
    low, across = min(values), max(steps[-1], 1)
    up = max(values) - low or 1.0
    places = [
        (EDGE + (WIDTH - 2 * EDGE) * step / across, HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * (value - low) / up)
        for step, value in zip(steps, values, strict=True)
    ]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
