"""The table of docs/results/introspection.md: python scripts/reproduce/introspection.py [OUT], after the script."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rltrain.compare.statistics import paired

COLUMNS = ("accuracy", "majority", "weighted_vote")


def main(folder: Path) -> None:
    """A line per kind of policy and budget: means over seeds, gains in points with Student's t intervals over seeds."""
    for name in ("cold", "after"):
        read = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}_*/evaluation.json"))]
        if read:
            errors = ", ".join(f"{each['eval_introspection/ece']:.3f}" for each in read)
            single = np.mean([each["eval_accuracy"] for each in read])
            print(
                f"{name}: {len(read)} seeds, accuracy of one sample {100 * single:.1f} %, calibration errors {errors}"
            )
            by_budget: dict[float, list[dict[str, float]]] = {}
            for row in (row for each in read for row in each["adaptive"]):
                by_budget.setdefault(row["budget"], []).append(row)
            for rows in by_budget.values():
                print(line(rows))


def line(rows: Sequence[dict[str, float]]) -> str:
    """One budget."""
    means = {key: float(np.mean([row[key] for row in rows])) for key in ("tokens", *COLUMNS)}
    cells = [
        f"{rows[0]['budget']:g}",
        str(len(rows)),
        f"{means['tokens']:.1f}",
        *(f"{100 * means[key]:.1f} %" for key in COLUMNS),
    ]
    for key in ("gain_over_majority", "gain_over_weighted_vote"):
        gains = 100 * np.array([row[key] for row in rows])
        interval = paired(gains, level=0.95)
        within = f" ({interval.low:+.1f} to {interval.high:+.1f})" if interval else ""
        cells.append(f"{gains.mean():+.1f}{within}")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/introspection"))
