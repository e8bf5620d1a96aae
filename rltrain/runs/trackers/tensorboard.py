"""TensorBoard's event files in ``tensorboard/`` of the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rltrain.runs.trackers.base import TrackedRun, Tracker, readable

SHOWN_SAMPLES = 16


class TensorboardTracker(Tracker):
    """Scalars, the config as text, and the first completions of a step as a table. Every step is flushed."""

    name = "tensorboard"

    def _start(self, run: TrackedRun) -> None:
        import yaml
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(run.folder / "tensorboard"))
        if self._last < 0:
            text = yaml.safe_dump(dict(run.config), sort_keys=False)
            self._writer.add_text("config", f"```yaml\n{text}```", 0)

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def _log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._writer.add_text("completions", table([readable(row) for row in rows[:SHOWN_SAMPLES]]), step)
        self._writer.flush()

    def _finish(self) -> None:
        self._writer.close()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, with the text of each cell as code, because models write Markdown and HTML themselves."""
    head = f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}"
    return "\n".join([head, *(f"| {' | '.join(map(_cell, row.values()))} |" for row in rows)])


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")
    for character in "`*_\\[]":
        escaped = escaped.replace(character, f"&#{ord(character)};")
    return escaped.replace("\n", "<br>")
