"""The table of ``scripts/reproduce/early_exit.sh``: by delta, the mean over seeds.

python scripts/reproduce/early_exit.py OUT
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rltrain.compare.statistics import paired

SHOWN = ("wrong_exit_share", "exits", "tokens_saved")


def by_delta(out: Path) -> dict[float, list[dict[str, float]]]:
    """What each seed's evaluation says of early exits."""
    found: dict[float, list[dict[str, float]]] = defaultdict(list)
    for path in sorted(out.glob("seed_*/*/evaluation.json")):
        found[float(path.parent.name)].append(json.loads(path.read_text())["early_exit"])
    return dict(sorted(found.items()))


def cell(shares: Sequence[float]) -> str:
    """Mean in percent with Student's t interval over seeds."""
    values = 100 * np.array(shares)
    interval = paired(values, level=0.95)
    spread = "" if interval is None else f" ({interval.low:.1f} to {interval.high:.1f})"
    return f"{values.mean():.1f} %{spread}"


def main(out: Path) -> None:
    """Print the table."""
    print("| delta | seeds | wrong exits (95 %) | left early | tokens saved | accuracy, exits less whole |")
    print("|---|---|---|---|---|---|")
    for delta, seeds in by_delta(out).items():
        cells = [cell([one[name] for one in seeds]) for name in SHOWN]
        change = cell([one["accuracy"] - one["accuracy_whole"] for one in seeds])
        print(f"| {100 * delta:g} % | {len(seeds)} | {' | '.join(cells)} | {change} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
