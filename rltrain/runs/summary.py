"""The picture of a run's learning curve, and what it is drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MetricRows = Sequence[Mapping[str, Any]]


def series(rows: MetricRows, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was recorded."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Trailing mean."""
    trailing = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(span) / len(span) for span in trailing]


def held_out_metric(runs: Mapping[str, MetricRows]) -> str:
    """``eval_accuracy`` if any answer was right, else ``eval_reward``: some rewards know no right and wrong."""
    right = any(value > 0 for rows in runs.values() for value in series(rows, "eval_accuracy")[1])
    return "eval_accuracy" if right else "eval_reward"


def plot_curves(runs: Mapping[str, MetricRows], path: Path, *, metric: str | None = None, window: int = 10) -> None:
    """Training reward and a held-out metric (None: :func:`held_out_metric`) against steps, one colour per run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    metric = metric or held_out_metric(runs)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for label, rows in runs.items():
        steps, rewards = series(rows, "reward")
        (line,) = left.plot(steps, smoothed(rewards, window), label=label)
        left.plot(steps, rewards, color=line.get_color(), alpha=0.25, linewidth=0.8)
        right.plot(*series(rows, metric), marker="o", color=line.get_color(), label=label)
    left.set(title=f"training reward (mean of {window} steps)", xlabel="step")
    right.set(title=metric.replace("eval_", "held-out "), xlabel="step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.dataLim.ymin >= 0:
            axes.set_ylim(bottom=0)
    if metric.endswith("accuracy"):
        right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if len(runs) > 1:
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(runs), 6))
    figure.savefig(path, dpi=110)
    plt.close(figure)
