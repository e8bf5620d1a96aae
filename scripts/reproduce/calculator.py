"""Tables and picture of scripts/reproduce/calculator.sh.

python scripts/reproduce/calculator.py RUNS      prints Markdown, writes RUNS/curves.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from quickstart_seeds import change_cells

from rltrain.runs.metrics import read_jsonl
from rltrain.runs.summary import series

ARMS = {"outcome": "GRPO, outcome", "turns": "MT-GRPO, outcome and turns"}
COLOURS = {"outcome": "tab:green", "turns": "tab:purple", "supervised": "tab:blue"}
START, SUPERVISED = "cold start", "more supervised training"


@dataclass(frozen=True, kw_only=True)
class CalledEvaluation:
    """Accuracy and share of completions with a call in percent, greedy; accuracy at temperature 1."""

    greedy: float
    sampled: float
    called: float

    @classmethod
    def of(cls, folder: Path) -> CalledEvaluation:
        greedy, sampled = (json.loads((folder / how / "evaluation.json").read_text()) for how in ("greedy", "sampled"))
        return cls(
            greedy=100 * greedy["eval_accuracy"],
            sampled=100 * sampled["eval_accuracy"],
            called=100 * greedy["eval_environment/call_ratio"],
        )


def supervised(seed: Path) -> CalledEvaluation:
    """The better of the supervised controls, by greedy accuracy."""
    return max(map(CalledEvaluation.of, sorted(seed.glob("sft_*"))), key=lambda arm: arm.greedy)


def arms_of(seed: Path) -> dict[str, CalledEvaluation]:
    """Every evaluated model of a seed, by what was done to it."""
    arms = {START: CalledEvaluation.of(seed / "cold_start")}
    arms |= {name: CalledEvaluation.of(seed / arm) for arm, name in ARMS.items()}
    return arms | {SUPERVISED: supervised(seed)}


def seed_table(seeds: Sequence[Path]) -> str:
    """Greedy accuracy of each seed."""
    names = list(arms_of(seeds[0]))
    lines = [f"| seed | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for seed in seeds:
        cells = [f"{one.greedy:.1f} %" for one in arms_of(seed).values()]
        lines.append(f"| {seed.name.removeprefix('seed_')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def arm_table(seeds: Sequence[Path]) -> str:
    """Means over seeds, and the change of greedy accuracy with its interval and the detectable effect."""
    arms = [arms_of(seed) for seed in seeds]
    lines = [
        "| | greedy | sampled, T = 1 | call, greedy | change of greedy, 95 % interval | detectable at 80 % power |"
    ]
    lines.append("|---" * 6 + "|")
    for name in arms[0]:
        means = [float(np.mean([getattr(one[name], key) for one in arms])) for key in ("greedy", "sampled", "called")]
        changes = np.array([one[name].greedy - one[START].greedy for one in arms])
        shown = " | ".join(f"{mean:.1f} %" for mean in means)
        lines.append(f"| {name} | {shown} | {change_cells(changes) if name != START else '– | –'} |")
    return "\n".join(lines)


def difference(seeds: Sequence[Path], one: str, other: str) -> str:
    """Of two arms, paired by cold start, in words."""
    arms = [arms_of(seed) for seed in seeds]
    mean, effect = change_cells(np.array([each[one].greedy - each[other].greedy for each in arms])).split(" | ")
    return f"{one} less {other}, points of greedy accuracy: {mean}, detectable {effect}."


def picture(seeds: Sequence[Path], path: Path) -> None:
    """Held-out greedy accuracy and share of completions with a call against steps: seeds thin, their mean thick."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = [(axes[0], "eval_accuracy", "greedy"), (axes[1], "eval_environment/call_ratio", "called")]
    for axis, metric, value in panels:
        steps: list[int] = []
        for arm, label in ARMS.items():
            curves = [series(read_jsonl(seed / arm / "metrics.jsonl"), metric) for seed in seeds]
            steps, values = curves[0][0], 100 * np.array([values for _, values in curves])
            axis.plot(steps, values.T, color=COLOURS[arm], alpha=0.3, linewidth=0.8)
            axis.plot(steps, values.mean(0), color=COLOURS[arm], marker="o", markersize=4, label=label)
        ends = [[getattr(arms_of(seed)[name], value) for name in (START, SUPERVISED)] for seed in seeds]
        style = {"color": COLOURS["supervised"], "linestyle": "--", "marker": "o", "markersize": 4}
        label = "more supervised training, as many sequences"
        axis.plot([0, steps[-1]], np.mean(ends, axis=0), label=label, **style)
        axis.set_xlabel("RL step")
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    axes[0].set_title("held-out accuracy, greedy (%)")
    axes[1].set_title("completions with a call (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Print the tables and draw."""
    runs = Path(sys.argv[1])
    seeds = sorted(runs.glob("seed_*"), key=lambda path: int(path.name.removeprefix("seed_")))
    differences = [difference(seeds, ARMS["outcome"], SUPERVISED), difference(seeds, ARMS["turns"], ARMS["outcome"])]
    print(seed_table(seeds), arm_table(seeds), *differences, sep="\n\n")
    picture(seeds, runs / "curves.png")


if __name__ == "__main__":
    main()
