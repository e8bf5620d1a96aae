"""Judgements as a Markdown table and as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rltrain.compare.gradients.families import TabularPolicy
from rltrain.compare.gradients.judging import Judgement
from rltrain.compare.statistics import Interval


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One estimator on one family at one group size: its judgement, or the reason why there is none.

    ``crashed``: the reason is no refusal of the estimator's.
    """

    label: str
    family: str
    group_size: int
    judgement: Judgement | None = None
    reason: str = ""
    crashed: bool = False
    seconds: float = 0.0


def table(cells: Sequence[Cell], policies: Sequence[TabularPolicy]) -> str:
    """One table per family; SNR in thousandths. The tokens are those generated per completion."""
    lines = []
    for policy in policies:
        lines += [
            f"\n**{policy.family.name}**: {policy.family.says}; expected reward {policy.expected_reward:.3f}, "
            f"{len(policy.completions)} completions, {policy.policy_SV.size} parameters\n",
            "| estimator | G | cosine | scale | bias | variance | SNR per completion, 1e-3 | tokens | "
            "SNR per token, 1e-3 |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_line(cell.label, cell.judgement) for cell in cells if cell.family == policy.family.name),
        ]
    somewhere = {cell.label for cell in cells if cell.judgement}
    missing = {
        f"Not measured{' elsewhere' if cell.label in somewhere else ''}: {cell.label}: {cell.reason}"
        for cell in cells
        if cell.reason
    }
    return "\n".join([*filter(None, lines), *(f"\n{reason}" for reason in sorted(missing))])


def _line(label: str, judged: Judgement | None) -> str:
    if judged is None:
        return ""
    shown = [
        _shown(judged.cosine),
        f"{judged.scale.estimate:.3g}",
        _shown(judged.bias),
        f"{judged.variance.estimate:.3g}",
        _shown(judged.snr, per=1e3),
        f"{judged.tokens.estimate:.3g}",
        _shown(judged.snr_per_token, per=1e3),
    ]
    return f"| {label} | {judged.group_size} | " + " | ".join(shown) + " |"


def _shown(interval: Interval, per: float = 1.0) -> str:
    return f"{per * interval.estimate:.3g} ({per * interval.low:.3g}, {per * interval.high:.3g})"


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Cosine and SNR against the group size, one column per family, bars for the intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = [(cell.label, cell.judgement) for cell in cells if cell.judgement]
    names = list(dict.fromkeys(judged.family for _, judged in measured))
    group_sizes = sorted({judged.group_size for _, judged in measured})
    figure, axes = plt.subplots(
        2, len(names), figsize=(4 * len(names), 6.5), squeeze=False, sharex=True, layout="constrained"
    )
    for column, name in enumerate(names):
        axes[0][column].set_title(name)
        axes[1][column].set_xlabel("group size")
        _draw(axes[0][column], [(label, judged, judged.cosine) for label, judged in measured if judged.family == name])
        _draw(axes[1][column], [(label, judged, judged.snr) for label, judged in measured if judged.family == name])
        axes[1][column].set_yscale("log")
    for axis in itertools.chain(*axes):
        axis.set_xscale("log", base=2)
        axis.set_xticks(group_sizes, map(str, group_sizes))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("cosine with the true gradient")
    axes[1][0].set_ylabel("signal-to-noise per completion")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axis, points: Sequence[tuple[str, Judgement, Interval]]) -> None:
    """A line with bars per label."""
    labels = list(dict.fromkeys(label for label, _, _ in points))
    for k, label in enumerate(labels):
        line = [(judged.group_size, interval) for other, judged, interval in points if other == label]
        middle = np.array([interval.estimate for _, interval in line])
        spread = np.abs([[interval.low for _, interval in line], [interval.high for _, interval in line]] - middle)
        # Shifted a little, or the bars of estimators that agree would hide each other.
        sizes = np.array([size for size, _ in line]) * 1.03 ** (k - len(labels) / 2)
        axis.errorbar(sizes, middle, spread, label=label, color=f"C{k}", marker="o", markersize=3, capsize=2)
