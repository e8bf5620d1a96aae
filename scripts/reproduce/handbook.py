"""Tables of scripts/reproduce/handbook.sh.

python scripts/reproduce/handbook.py RUNS      prints Markdown
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from quickstart_seeds import change_cells

ARMS = {
    "without": "no handbook",
    "with": "handbook by tag",
    "swapped": "the same, instructions swapped",
    "tuned_with/evaluation": "fine-tuned on solutions with it",
    "tuned_without/evaluation": "fine-tuned on solutions without",
}
KEYS = {"accuracy": "eval_accuracy", "tokens": "eval_completions/mean_length", "entries": "eval_handbook/tokens"}
PAIRS = (
    ("with", "without"),
    ("swapped", "with"),
    ("tuned_with/evaluation", "tuned_without/evaluation"),
    ("tuned_with/evaluation", "with"),
)


def value(seed: Path, arm: str, key: str) -> float:
    """A metric of an arm's greedy evaluation, accuracy in percent."""
    found = json.loads((seed / arm / "evaluation.json").read_text())["greedy"].get(KEYS[key], 0.0)
    return 100 * found if key == "accuracy" else found


def values(seeds: Sequence[Path], arm: str, key: str) -> np.ndarray:
    """A metric of an arm on every seed."""
    return np.array([value(seed, arm, key) for seed in seeds])


def table(seeds: Sequence[Path]) -> str:
    """Means over seeds, with the seeds' accuracies."""
    lines = ["| | accuracy | tokens written | tokens of the entries | accuracy by seed |", "|---|---|---|---|---|"]
    for arm, name in ARMS.items():
        accuracy, tokens, entries = (values(seeds, arm, key) for key in KEYS)
        each = ", ".join(f"{one:.1f}" for one in accuracy)
        lines.append(f"| {name} | {accuracy.mean():.1f} % | {tokens.mean():.1f} | {entries.mean():.1f} | {each} |")
    return "\n".join(lines)


def differences(seeds: Sequence[Path]) -> str:
    """Paired differences with Student's intervals and the effect that is detectable at 80 % power."""
    lines = ["| | points of accuracy | detectable | tokens written | detectable |", "|---|---|---|---|---|"]
    for one, other in PAIRS:
        cells = [change_cells(values(seeds, one, key) - values(seeds, other, key)) for key in ("accuracy", "tokens")]
        lines.append(f"| {ARMS[one]} less {ARMS[other]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    seeds = sorted(Path(sys.argv[1]).glob("seed_*"), key=lambda path: int(path.name.removeprefix("seed_")))
    seeds = [seed for seed in seeds if all((seed / arm / "evaluation.json").is_file() for arm in ARMS)]
    print(table(seeds), differences(seeds), sep="\n\n")


if __name__ == "__main__":
    main()
