"""Draw the learning curves of several runs in one picture and print a held-out metric before and after.

python scripts/reproduce/plot.py PICTURE RUN [RUN…] [--metric eval_reward]
"""

import argparse
from pathlib import Path

from rltrain.runs.metrics import read_jsonl
from rltrain.runs.summary import plot_curves, series


def main() -> None:
    """Read the runs' metrics, draw, print one line per run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--metric", default="eval_accuracy")
    arguments = parser.parse_args()
    rows = {run.name: read_jsonl(run / "metrics.jsonl") for run in arguments.runs}
    plot_curves(rows, arguments.picture, metric=arguments.metric)
    print(f"{'run':24s}{'before':>9s}{'after':>9s}{'change':>9s}")
    for name, lines in rows.items():
        _, values = series(lines, arguments.metric)
        print(f"{name:24s}{values[0]:9.3f}{values[-1]:9.3f}{values[-1] - values[0]:+9.3f}")


if __name__ == "__main__":
    main()
