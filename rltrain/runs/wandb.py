"""wandb beside the files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rltrain.config import TrackingConfig

log = logging.getLogger(__name__)


class WandbWriter:
    """Writes metrics and samples to wandb too, system metrics included. A failure of wandb is a warning.

    A resumed run continues the same wandb run. Steps that it repeats have the same values, and wandb keeps the
    first.
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
            # The runs table shows last values. Of accuracy it also shows the best.
            self._run.define_metric("eval_accuracy", summary="last,max")

    def catch_up(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Log again the steps that a killed run lost: wandb writes in blocks, from a process that may end first.

        wandb ignores the steps that it has.
        """
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
        except Exception as error:  # whatever wandb raises must not end the run
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
