"""Tables and picture of scripts/reproduce/quickstart_seeds.sh.

python scripts/reproduce/quickstart_seeds.py RUNS      prints Markdown, writes RUNS/curves.png
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rltrain.compare.statistics import detectable, paired
from rltrain.runs.metrics import read_jsonl
from rltrain.runs.summary import series

REWARDS = {"right": "right reward", "random": "random reward", "inverted": "inverted reward"}
COLOURS = {"right": "tab:green", "random": "tab:gray", "inverted": "tab:red", "supervised": "tab:blue"}
LEVEL = 0.95
CONTROL, LONGER = 80, 280  # supervised steps: as many sequences as RL, and more


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracy in percent, greedy and at temperature 1 (NaN: not run), and the greedy mean length in tokens."""

    greedy: float
    sampled: float
    length: float

    @classmethod
    def of(cls, folder: Path) -> Evaluation:
        greedy = json.loads((folder / "temperature_0" / "evaluation.json").read_text())
        other = folder / "temperature_1" / "evaluation.json"
        return cls(
            greedy=100 * greedy["eval_accuracy"],
            sampled=100 * json.loads(other.read_text())["eval_accuracy"] if other.exists() else math.nan,
            length=greedy["eval_completions/mean_length"],
        )

    def __str__(self) -> str:
        sampled = "–" if math.isnan(self.sampled) else f"{self.sampled:.1f} %"
        return f"{self.greedy:.1f} % | {sampled} | {self.length:.1f}"


def supervised(seed: Path, steps: int = CONTROL) -> tuple[str, Evaluation]:
    """The better of the supervised controls of so many steps, by greedy accuracy, and its rate."""
    arms = {folder.name.split("_")[1]: Evaluation.of(folder) for folder in sorted(seed.glob(f"sft_*_{steps}"))}
    return max(arms.items(), key=lambda arm: arm[1].greedy)


def learning_table(seeds: Sequence[Path]) -> str:
    """Per seed: greedy accuracy before and after GRPO, then the control."""
    lines = ["| seed | cold-started | after GRPO | change | more supervised training | change | its rate |"]
    lines.append("|---|---|---|---|---|---|---|")
    for seed in seeds:
        before, after = Evaluation.of(seed / "cold_start").greedy, Evaluation.of(seed / "right").greedy
        rate, control = supervised(seed)
        cells = [f"{before:.1f} %", f"{after:.1f} %", f"{after - before:+.1f}"]
        cells += [f"{control.greedy:.1f} %", f"{control.greedy - before:+.1f}", rate]
        lines.append(f"| {seed.name.removeprefix('seed_')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arms_of(seed: Path) -> dict[str, Evaluation]:
    """Every evaluated model of a seed, by what was done to it."""
    arms = {"cold start": Evaluation.of(seed / "cold_start")}
    arms |= {
        name: Evaluation.of(seed / arm) for arm, name in REWARDS.items() if (seed / arm / "temperature_0").is_dir()
    }
    controls = [steps for steps in (CONTROL, LONGER) if any(seed.glob(f"sft_*_{steps}"))]
    return arms | {f"{steps} more supervised steps": supervised(seed, steps)[1] for steps in controls}


def arm_table(seeds: Sequence[Path]) -> str:
    """Means over seeds, and the change of greedy accuracy with its interval and the detectable effect."""
    arms = [arms_of(seed) for seed in seeds]
    lines = ["| | greedy | sampled, T = 1 | length | change of greedy, 95 % interval | detectable at 80 % power |"]
    lines.append("|---|---|---|---|---|---|")
    for name in arms[0]:
        mean = Evaluation(
            **{
                key: float(np.mean([getattr(one[name], key) for one in arms]))
                for key in ("greedy", "sampled", "length")
            }
        )
        changes = np.array([one[name].greedy - one["cold start"].greedy for one in arms])
        lines.append(f"| {name} | {mean} | {change_cells(changes) if name != 'cold start' else '– | –'} |")
    return "\n".join(lines)


def change_cells(changes: np.ndarray) -> str:
    """Mean change with Student's t interval, and the change that the design detects."""
    interval = paired(changes, level=LEVEL)
    if interval is None:
        return f"{changes.mean():+.1f} | –"
    effect = detectable(float(changes.std(ddof=1)), len(changes), level=LEVEL)
    return f"{interval.estimate:+.1f} ({interval.low:+.1f} to {interval.high:+.1f}) | {effect:.1f}"


def difference(seeds: Sequence[Path]) -> str:
    """GRPO less the supervised control, in words."""
    arms = [arms_of(seed) for seed in seeds]
    pairs = np.array([one["right reward"].greedy - one[f"{CONTROL} more supervised steps"].greedy for one in arms])
    mean, effect = change_cells(pairs).split(" | ")
    return f"GRPO less more supervised training, points of greedy accuracy: {mean}, detectable {effect}."


def picture(seeds: Sequence[Path], path: Path) -> None:
    """Held-out greedy accuracy and completion length against steps: every seed thin, their mean thick."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels: list[tuple[Any, str, Callable[[Evaluation], float], float]] = [
        (axes[0], "eval_accuracy", lambda one: one.greedy, 100.0),
        (axes[1], "eval_completions/mean_length", lambda one: one.length, 1.0),
    ]
    for axis, metric, value, scale in panels:
        last = draw_rewards(axis, seeds, metric, scale)
        draw_control(axis, seeds, value, last)
        axis.set_xlabel("GRPO step")
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    axes[0].set_title("held-out accuracy, greedy (%)")
    axes[1].set_title("mean length of a completion (tokens)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_rewards(axis: Any, seeds: Sequence[Path], metric: str, scale: float) -> int:
    """One colour a reward; returns the last step."""
    steps: list[int] = []
    for arm, label in REWARDS.items():
        if not (seeds[0] / arm / "temperature_0").is_dir():
            continue
        curves = [series(read_jsonl(seed / arm / "metrics.jsonl"), metric) for seed in seeds]
        steps, values = curves[0][0], scale * np.array([values for _, values in curves])
        axis.plot(steps, values.T, color=COLOURS[arm], alpha=0.3, linewidth=0.8)
        axis.plot(steps, values.mean(0), color=COLOURS[arm], marker="o", markersize=4, label=label)
    return steps[-1]


def draw_control(axis: Any, seeds: Sequence[Path], value: Callable[[Evaluation], float], last: int) -> None:
    """A dashed line from the cold start to the supervised control, which sees as many sequences as RL."""
    ends = np.array([[value(Evaluation.of(seed / "cold_start")), value(supervised(seed)[1])] for seed in seeds])
    label = "more supervised training, as many sequences"
    axis.plot(
        [0, last], ends.mean(0), color=COLOURS["supervised"], linestyle="--", marker="o", markersize=4, label=label
    )


def main() -> None:
    """Print the tables and draw."""
    runs = Path(sys.argv[1])
    seeds = sorted(runs.glob("seed_*"))
    print(learning_table(seeds), arm_table(seeds), difference(seeds), sep="\n\n")
    picture(seeds, runs / "curves.png")


if __name__ == "__main__":
    main()
