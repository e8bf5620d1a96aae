"""Everything a run writes about itself as it goes: console, ``metrics.jsonl``, samples, trackers. Rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rltrain.config import RunConfig
from rltrain.runs import ending, lock, run_folder, trackers
from rltrain.runs.console import Console
from rltrain.runs.metrics import JsonlWriter, read_jsonl
from rltrain.runs.trackers.base import TrackedRun
from rltrain.runtime import dist, progress
from rltrain.types import Advantages, Group


class Recorder:
    """Passes metrics and samples on to the console, the files and the trackers."""

    def __init__(self, run_dir: Path, config: RunConfig, *, first_step: int, tokenizer: Any) -> None:
        self._run_dir = run_dir
        self._every_steps, self._steps = config.tracking.samples_every_steps, config.steps
        self._tokenizer = tokenizer
        self._console = Console(config, first_step=first_step)
        if dist.is_main():
            if first_step == 0:  # not before the models are loaded: what fails earlier leaves no config to differ from
                run_folder.write_provenance(run_dir, config)
            # A run that starts over also writes step 0 again.
            self._jsonl = JsonlWriter(run_dir / "metrics.jsonl", resume_step=first_step if first_step else -1)
            tracked = TrackedRun(
                folder=run_dir, name=config.name, config=run_folder.resolved(config), tracking=config.tracking
            )
            self._trackers = trackers.started(config.tracking, tracked)
            for tracker in self._trackers:
                tracker.catch_up(read_jsonl(self._jsonl.path))
            if first_step:
                self._console.begin()

    def announce_evaluation(self, step: int, problems: int) -> None:
        """Say that an evaluation begins."""
        self._console.announce_evaluation(step, problems)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of a step, everywhere."""
        if dist.is_main():
            lock.refuse_if_lost(self._run_dir)
            self._jsonl.write(step, values)
            for tracker in self._trackers:
                tracker.write(step, values)
            self._console.update(step, values)

    def write_samples(self, step: int, groups: Sequence[Group], advantages: Advantages) -> None:
        """The completions of a step with their rewards and token advantages, of all ranks.

        Every so many steps, and always of the first step and the last.
        """
        self._console.show_samples(step, groups)
        if self._every_steps == 0 or (step % self._every_steps and step not in (1, self._steps)):
            return
        local = run_folder.sample_rows(step, groups, advantages, self._tokenizer)
        rows = [row for rows in dist.gather_objects(local, name="samples") for row in rows]
        if dist.is_main():
            run_folder.write_samples(self._run_dir, f"step_{step:06d}", rows)
            # Without notes, whose names may change from step to step: the columns of a wandb table are fixed.
            fixed = [{k: v for k, v in row.items() if "note/" not in k} for row in rows]
            for tracker in self._trackers:
                tracker.write_samples(step, fixed)

    def summarise(self) -> None:
        """At the end: the learning curve as a picture, and the last lines on standard output."""
        self._console.close()
        if dist.is_main():
            text = f"\n{ending.last_lines(self._run_dir)}"
            print(text, flush=True)
            progress.shown.info("%s", text)

    def close(self) -> None:
        """Close the console and the trackers."""
        self._console.close()
        if dist.is_main():
            for tracker in self._trackers:
                tracker.close()
