"""SPAE and its parts against GRPO and DAPO, in many minibatches: accuracy, length, and what the lines do.

python scripts/reproduce/spae.py [OUT] [--tasks tail,chains] [--methods GRPO,SPAE] [--seeds 5]

Tasks and methods are in spae.yaml beside this file. Runs go as those of league.py: seed by seed from shared cold
starts, a finished one is never run again. Prints Markdown: per task the means over seeds, and paired differences from
GRPO with intervals.

accuracy   held-out samples at temperature 1, after the last step, and the mean over the run
length     tokens of these samples
The rest counts lines of the completions sampled for the last six steps:
slips      share of the first k lines that are not the right sum of the line before and the next digit
missing    share of completions with fewer than k lines
tail       lines after the k-th
copies     share of these that repeat the k-th
share      lines after the k-th, as a share of all lines
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from league import Cell, cells, import_once, names, numbers, run

from rltrain.compare.statistics import detectable, paired
from rltrain.runs.metrics import read_jsonl

SPECIFICATION = Path(__file__).with_name("spae.yaml")
LAST_STEPS = 6
LEVEL = 0.95
BASELINE = "GRPO"


def specification() -> dict[str, Any]:
    """spae.yaml, with what methods share written out."""
    given = yaml.safe_load(SPECIFICATION.read_text())
    for name, words in given["methods"].items():
        shared = given["spae"] if name.startswith("SPAE") else []
        given["methods"][name] = [*shared, *words, *given["common"]]
    return given


def lines_of(completion: str) -> list[str]:
    """The lines before the box."""
    return completion.split("\\boxed{", maxsplit=1)[0].split("\n")[:-1]


def counts(prompt: str, completion: str, base: int) -> dict[str, tuple[float, float]]:
    """A completion's counts as (sum, count); see this file's head."""
    digits, lines = [int(digit) for digit in prompt.strip().split("+")], lines_of(completion)
    decisions = len(digits) - 1
    solving, tail = lines[:decisions], lines[decisions:]
    before = [str(digits[0]), *solving[:-1]]
    pairs = zip(before, digits[1:], solving, strict=False)
    slips = sum(not first.isdigit() or line != str((int(first) + digit) % base) for first, digit, line in pairs)
    return {
        "slips, %": (100.0 * slips, len(solving)),
        "missing, %": (100.0 * (len(solving) < decisions), 1),
        "tail, lines": (len(tail), 1),
        "copies, %": (100.0 * sum(line == solving[-1] for line in tail), len(tail)),
        "share, %": (100.0 * len(tail), len(lines)),
    }


def measured(one: Cell, out: Path, base: int) -> dict[str, float]:
    """What a finished run is judged by."""
    folder = out / one.folder
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if row.get("eval_accuracy") is not None]
    found = {
        "accuracy, last, %": 100 * rows[-1]["eval_accuracy"],
        "accuracy over the run, %": 100 * float(np.mean([row["eval_accuracy"] for row in rows])),
        "length, first": rows[0]["eval_completions/mean_length"],
        "length, last": rows[-1]["eval_completions/mean_length"],
    }
    totals: dict[str, list[float]] = {}
    for path in sorted((folder / "samples").glob("step_*.parquet"))[-LAST_STEPS:]:
        for row in pq.read_table(path, columns=["prompt", "completion"]).to_pylist():
            for name, (total, count) in counts(row["prompt"], row["completion"], base).items():
                sums = totals.setdefault(name, [0.0, 0.0])
                sums[0], sums[1] = sums[0] + total, sums[1] + count
    return found | {name: total / count if count else float("nan") for name, (total, count) in totals.items()}


def table(task: str, by_method: Mapping[str, Mapping[int, dict[str, float]]]) -> str:
    """A row per quantity, a column per method: the mean over seeds, and the paired difference from the baseline."""
    lines = [f"### {task}", "", f"| | {' | '.join(f'{name}, n = {len(by_method[name])}' for name in by_method)} |"]
    lines.append("|---" * (len(by_method) + 1) + "|")
    quantities = next(iter(next(iter(by_method.values())).values()))
    for name in quantities:
        cells = [shown(name, by_method[method], by_method.get(BASELINE, {})) for method in by_method]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(name: str, own: Mapping[int, dict[str, float]], baseline: Mapping[int, dict[str, float]]) -> str:
    """``91.2; +3.0 (0.5 to 5.5), finds 3.4``: mean, difference with its interval, and the detectable effect."""
    mean = f"{np.nanmean([values[name] for values in own.values()]):.1f}"
    differences = np.array([own[seed][name] - baseline[seed][name] for seed in own if seed in baseline])
    differences = differences[~np.isnan(differences)]
    interval = None if own is baseline else paired(differences, level=LEVEL)
    if interval is None:
        return mean
    found = detectable(float(differences.std(ddof=1)), len(differences), level=LEVEL)
    shown_interval = f"{interval.estimate:+.1f} ({interval.low:+.1f} to {interval.high:+.1f})"
    return f"{mean}; {f'**{shown_interval}**' if interval.excludes_zero else shown_interval}, finds {found:.1f}"


def report(chosen: Sequence[Cell], out: Path, base: int) -> str:
    """The tables of what is finished."""
    tasks: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    for one in chosen:
        if one.finished(out):
            tasks.setdefault(one.task, {}).setdefault(one.method, {})[one.seed] = measured(one, out, base)
    return "\n\n".join(table(task, by_method) for task, by_method in tasks.items())


def main() -> None:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/spae"))
    parser.add_argument("--tasks", type=names, default=[], help="between commas (default: all)")
    parser.add_argument("--methods", type=names, default=[], help="between commas (default: all)")
    parser.add_argument("--seeds", type=numbers, default=[], help="a count, or a list with a comma (default: 5)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each (default: 1)")
    options = parser.parse_args()
    given, out = specification(), options.out.resolve()
    os.environ |= {"OMP_NUM_THREADS": "1"}
    chosen = cells(given, tasks=options.tasks, methods=options.methods, seeds=options.seeds)
    import_once()
    from rltrain import cli

    base = cli.compose(["+experiment=digit_chains"]).data.base
    failed = run(chosen, out, options.jobs)
    print(report(chosen, out, base))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
