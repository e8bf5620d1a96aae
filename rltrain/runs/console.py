"""Progress of a run for a person: a bar on a terminal, plain lines elsewhere. Rank 0 only."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rltrain.runs import log_file
from rltrain.runtime import dist

SHOWN = ("reward", "eval_accuracy", "completions/mean_length", "entropy", "grad_norm")


class Console:
    """Call ``update`` once a step and ``close`` at the end."""

    def __init__(self, *, first_step: int, steps: int) -> None:
        self._steps = steps
        self._first_step = first_step
        self._start = time.monotonic()
        self._bar, self._task = (
            _progress_bar(first_step, steps) if dist.is_main() and sys.stderr.isatty() else (None, None)
        )

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics after ``step`` steps are done."""
        if not dist.is_main():
            return
        text = "  ".join(f"{name} {values[name]:.4g}" for name in SHOWN if name in values)
        text += f"  {values.get('perf/throughput', 0):.0f} tok/s"
        done = max(1, step - self._first_step)
        remaining_s = (time.monotonic() - self._start) / done * (self._steps - step)
        line = f"step {step}/{self._steps}  {text}  ETA {remaining_s:.0f} s"
        log_file.shown.info("%s", line)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=text)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop the bar and restore the terminal."""
        if self._bar is not None:
            self._bar.stop()


def _progress_bar(first_step: int, steps: int) -> tuple[Any, Any]:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("ETA"), TimeRemainingColumn())
    bar = Progress(*columns, TextColumn("{task.fields[metrics]}"), console=RichConsole(stderr=True))
    task = bar.add_task("train", total=steps, completed=first_step, metrics="")
    bar.start()
    return bar, task
