"""More of the cold start's supervised training in place of RL, on every task of the league: does it change anything?

python scripts/reproduce/league_controls.py [OUT] [--tasks forks,mirror] [--seeds 8]

As many sequences as RL samples, fresh ones of the cold start's last mixture, at the task's own rate and at five times
it, falling to zero. Accuracy at temperature 1, as in the league. Run it after scripts/reproduce/league.py, whose cold
starts it takes. What is measured is kept in OUT/controls. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from league import cell, names, numbers, plain, specification

from rltrain.compare.comparison import LEVEL
from rltrain.compare.statistics import detectable, paired
from rltrain.runs.metrics import read_jsonl

FACTORS = (1.0, 5.0)
MIXTURE = {"think first": ("data.all_worked=0",)}  # leaves the first stage out of the fresh problems
OTHERWISE = ("data.all_right=0", "data.ramp=0")


def cold_start_of(out: Path, task: str, seed: int) -> Path | None:
    """The shared cold start of a task and seed, if the league has made it."""
    for record in sorted((out / plain(task) / "cold_starts").glob("*/sft.json")):
        if json.loads(record.read_text())["config"]["seed"] == seed:
            return record.parent
    return None


def accuracy_before(out: Path, given: Mapping[str, Any], task: str, seed: int) -> float | None:
    """The league's evaluation before the first step."""
    metrics = out / cell(given, task, "GRPO", seed).folder / "metrics.jsonl"
    rows = read_jsonl(metrics) if metrics.is_file() else []
    return next((row["eval_accuracy"] for row in rows if row.get("eval_accuracy") is not None), None)


def accuracy_after(out: Path, given: Mapping[str, Any], task: str, seed: int, rate: float, start: Path) -> float:
    """Train further in this process, evaluate, and keep the result."""
    folder = out / "controls" / plain(task) / f"{rate:g}-seed{seed}"
    kept = folder / "evaluation.json"
    if not kept.is_file():
        from rltrain import cli, evaluate, sft

        words = [f"+experiment={given['tasks'][task]['experiment']}", f"seed={seed}", f"run_dir={folder}"]
        rl = cli.compose(words)
        steps = rl.steps * rl.batch.prompts_per_step * rl.batch.group_size // rl.cold_start.batch_size
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        more = [f"model.path={start}", "data.seed=1", *MIXTURE.get(task, OTHERWISE), f"cold_start.steps={steps}"]
        more += ["cold_start.warmup_steps=2", f"cold_start.learning_rate={rate:g}"]
        sft.train(cli.compose([*words, *more]), folder / "cold_start")
        evaluate.main(cli.compose([*words, f"model.path={folder / 'cold_start'}"]))
        shutil.rmtree(folder / "cold_start")
    return float(json.loads(kept.read_text())["eval_accuracy"])


def row(task: str, before: Sequence[float], after: Sequence[Sequence[float]], rates: Sequence[float]) -> str:
    """A task's line: ``after[s][f]`` is that of seed s at rate f; the better rate of each seed counts, against RL."""
    best = np.array([max(of_seed) for of_seed in after])
    changes = best - np.array(before)
    interval = paired(changes, level=LEVEL)
    shown = f"{100 * changes.mean():+.1f}"
    found = "–"
    if interval is not None:
        shown += f" ({100 * interval.low:+.1f} to {100 * interval.high:+.1f})"
        found = f"{100 * detectable(float(changes.std(ddof=1)), len(changes), level=LEVEL):.1f}"
    chosen = ", ".join(f"{rate:g}" for rate in rates)
    means = [f"{100 * values.mean():.1f}" for values in (np.array(before), best)]
    cells = [task, str(len(best)), chosen, *means, shown, found]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/league"))
    parser.add_argument("--tasks", type=names, default=[])
    parser.add_argument("--seeds", type=numbers, default=[])
    options = parser.parse_args()
    out, given = options.out.resolve(), specification()
    lines = ["| task | seeds | rates | cold start | more supervised training, better rate | change | detectable |"]
    lines.append("|---|---|---|---|---|---|---|")
    for task in options.tasks or given["required"]["tasks"]:
        rates = [factor * float(given["tasks"][task]["rate"]) for factor in FACTORS]
        before, after = [], []
        for seed in options.seeds or range(given["required"]["seeds"]):
            start, first = cold_start_of(out, task, seed), accuracy_before(out, given, task, seed)
            if start is not None and first is not None:
                before.append(first)
                after.append([accuracy_after(out, given, task, seed, rate, start) for rate in rates])
        if before:
            lines.append(row(task, before, after, rates))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
