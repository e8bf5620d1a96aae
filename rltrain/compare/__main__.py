"""Compare methods over several seeds each.

python -m rltrain.compare RUN [RUN…] --by advantage

RUN is a run folder or a folder of run folders. Writes comparison.png and prints tables, or JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rltrain import cli
from rltrain.compare.comparison import compare
from rltrain.compare.folders import common_folder, read
from rltrain.compare.picture import plot
from rltrain.compare.words import sentences, tables
from rltrain.errors import RunError, require

WIDTH = 140  # of the tables where the output is no terminal


def parser() -> argparse.ArgumentParser:
    """The command line."""
    described = argparse.ArgumentParser(
        prog="python -m rltrain.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    described.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    described.add_argument("--by", default="name", help="dotted keys of config.yaml that name a method (default: name)")
    described.add_argument("--baseline", help="the method that the others are compared with (default: the first)")
    described.add_argument("--metric", default="eval_accuracy", help="of metrics.jsonl (default: eval_accuracy)")
    described.add_argument("--reach", type=float, help="count completions to this value of the metric")
    described.add_argument("--task", default="", help="dotted keys that name a task, where runs differ in it")
    described.add_argument("--partial", action="store_true", help="keep unfinished runs; all are cut to the shortest")
    described.add_argument("--plot", type=Path, help="the picture (default: comparison.png above the runs)")
    described.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return described


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, compare, draw, print."""
    options = parser().parse_args(arguments)
    by, task = ([key for key in keys.split(",") if key] for keys in (options.by, options.task))
    reading = read(options.runs, by=by, metric=options.metric, task=task, partial=options.partial)
    if not reading.curves:
        raise RunError("; ".join([*reading.notes, "no run is left to compare"]))
    names = list(dict.fromkeys(curve.method for curve in reading.curves))
    require(
        options.baseline is None or options.baseline in names,
        f"--baseline {options.baseline}: no such method; --by {options.by} gives {', '.join(names)}",
    )
    result = compare(reading.curves, metric=options.metric, baseline=options.baseline, reach=options.reach)
    result = replace(result, notes=[*reading.notes, *result.notes])
    path = options.plot or common_folder(reading.curves) / "comparison.png"
    plot(result, reading.curves, path)
    if options.json:
        print(json.dumps(asdict(result) | {"sentences": sentences(result), "plot": str(path)}, indent=1))
        return
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False).print(tables(result))
    print("", *(f"- {line}" for line in sentences(result)), *(f"note: {line}" for line in result.notes), sep="\n")
    print(f"\npicture: {path}")


if __name__ == "__main__":
    with cli.errors_in_one_line():
        main()
