"""The mix of traces and the table of ``scripts/reproduce/traces.sh``.

python scripts/reproduce/traces.py mix FOLDER_OF_A_SEED NUMBER
python scripts/reproduce/traces.py table OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from quickstart_seeds import change_cells

ARMS = ("before", "teacher", "friendly", "mixed", "alone")
WRITTEN = ("teacher", "friendly", "alone")


def mix(folder: Path, number: int) -> None:
    """``first.jsonl`` of each arm: ``number`` right traces; of ``mixed`` half of the teacher's, half friendly ones."""
    rows = {name: _lines(folder / name / "sft.jsonl") for name in WRITTEN}
    for name, kept in rows.items():
        if len(kept) < number:
            sys.exit(f"{folder / name}: {len(kept)} right traces, {number} are wanted; set ASKED higher or KEPT lower")
    chosen = {name: kept[:number] for name, kept in rows.items()}
    # Odd and even places, so that the mix has a problem once.
    chosen["mixed"] = [pair[i % 2] for i, pair in enumerate(_pairs(rows["teacher"], rows["friendly"]))][:number]
    for name, kept in chosen.items():
        path = folder / name / "first.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(kept) + "\n")


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def _pairs(teacher: Sequence[str], friendly: Sequence[str]) -> list[tuple[str, str]]:
    """The two traces of each problem that both got right, then those that one of them did."""
    by_id = [{json.loads(line)["id"]: line for line in lines} for lines in (teacher, friendly)]
    ids = sorted(dict.fromkeys([*by_id[0], *by_id[1]]), key=lambda one: (one not in by_id[0]) + (one not in by_id[1]))
    return [(by_id[0].get(one, by_id[1].get(one, "")), by_id[1].get(one, by_id[0].get(one, ""))) for one in ids]


def table(out: Path) -> None:
    """Accuracy by arm, and its paired change from before over seeds, with the interval and what can be detected."""
    seeds = [folder for folder in sorted(out.glob("seed_*")) if all(map(Path.is_file, _paths(folder)))]
    found = {name: [_figures(seed / name) for seed in seeds] for name in ARMS}
    print(f"{len(seeds)} seeds\n\n| traces | greedy | sampled | sampled, change | detectable | length |")
    print("|---|---|---|---|---|---|")
    for name, figures_SF in found.items():
        greedy, sampled, length = np.mean(figures_SF, axis=0)
        changes_S = np.array(figures_SF)[:, 1] - np.array(found["before"])[:, 1]
        change = "– | –" if name == "before" else change_cells(changes_S)
        print(f"| {name} | {greedy:.1f} % | {sampled:.1f} % | {change} | {length:.1f} |")
    for seed, name in ((seed, name) for seed in seeds for name in WRITTEN):
        print(seed.name, name, json.loads((seed / name / "traces.json").read_text())["counts"])


def _paths(seed: Path) -> list[Path]:
    return [seed / name / "evaluation.json" for name in ARMS]


def _figures(folder: Path) -> tuple[float, float, float]:
    """Greedy and sampled accuracy in percent, and the mean length of what was sampled, in tokens."""
    found = json.loads((folder / "evaluation.json").read_text())
    length = found["eval_completions/mean_length"]
    return 100 * found["greedy"]["eval_accuracy"], 100 * found["eval_accuracy"], length


if __name__ == "__main__":
    if sys.argv[1:2] == ["mix"]:
        mix(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        table(Path(sys.argv[2]))
