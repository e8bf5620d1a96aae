"""wandb beside the files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rltrain.runs.trackers.base import TrackedRun, Tracker, stable_id, typed


class WandbTracker(Tracker):
    """Metrics, samples with all their columns, and system metrics.

    wandb writes in blocks, from a process that may end before this one. It keeps the first of two values of a step.
    """

    name = "wandb"
    loses_on_kill = True

    def _start(self, run: TrackedRun) -> None:
        import wandb

        self._table: Any = None
        self._run = wandb.init(
            mode=wandb_mode(run.tracking.wandb),  # type: ignore[arg-type]
            project=run.tracking.project,
            entity=run.tracking.entity,
            group=run.tracking.group,
            job_type="train",
            name=run.name,
            id=stable_id(run.folder, self.name),
            resume="allow",
            allow_val_change=True,  # a resumed run may have another folder, or more steps
            dir=str(run.folder),
            config=dict(run.config),
            settings=wandb.Settings(init_timeout=60, silent=True),
        )
        # The runs table shows last values. Of accuracy it also shows the best.
        self._run.define_metric("eval_accuracy", summary="last,max")

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def _log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to the ``completions`` table, which grows over the run."""
        import wandb

        cells = [typed(row) for row in rows]
        if self._table is None:
            self._table = wandb.Table(columns=list(cells[0]), log_mode="INCREMENTAL")
        for row in cells:
            self._table.add_data(*row.values())
        self._run.log({"completions": self._table}, step=step)

    def _finish(self) -> None:
        self._run.finish()


def wandb_mode(requested: str) -> str:
    """``auto`` becomes online with an API key, else offline."""
    if requested != "auto":
        return requested
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
