"""trackio beside the files: a local dashboard, or a Space where ``TRACKIO_SPACE_ID`` names one."""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

from rltrain.runs.trackers.base import TrackedRun, Tracker, readable, stable_id


class TrackioTracker(Tracker):
    """Scalars and a ``completions`` table per step with samples, in the project ``tracking.project``.

    trackio finds a run to resume by its name, so the name ends in an id of the run folder.
    """

    name = "trackio"

    def _start(self, run: TrackedRun) -> None:
        self._trackio: Any = importlib.import_module(self.name)  # this file has the package's name, too
        with redirect_stdout(io.StringIO()):  # it prints where its dashboard is, at every start
            self._run = self._trackio.init(
                project=run.tracking.project,
                name=f"{run.name}-{stable_id(run.folder, self.name)}",
                group=run.tracking.group,
                config=dict(run.config),
                resume="allow",
                embed=False,
            )

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def _log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        cells = [readable(row) for row in rows]
        table = self._trackio.Table(columns=list(cells[0]), data=[list(row.values()) for row in cells])
        self._run.log({"completions": table}, step=step)

    def _finish(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._trackio.finish()
