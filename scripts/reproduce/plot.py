"""Draw the learning curves of several runs in one picture and print their held-out accuracy before and after.

python scripts/reproduce/plot.py PICTURE RUN [RUN…]
"""

import argparse
from pathlib import Path

from rltrain.metrics import read_jsonl
from rltrain.summary import plot_curves, series


def main() -> None:
    """Read the runs' metrics, draw, print one line per run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()
    rows = {run.name: read_jsonl(run / "metrics.jsonl") for run in arguments.runs}
    plot_curves(rows, arguments.picture)
    print(f"{'run':24s}{'before':>9s}{'after':>9s}{'change':>9s}")
    for name, lines in rows.items():
        _, accuracies = series(lines, "eval_accuracy")
        print(f"{name:24s}{accuracies[0]:9.3f}{accuracies[-1]:9.3f}{accuracies[-1] - accuracies[0]:+9.3f}")


if __name__ == "__main__":
    main()
