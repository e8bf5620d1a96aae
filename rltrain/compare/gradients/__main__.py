"""Every registered estimator against the true policy gradient, on problems small enough to enumerate.

    python -m rltrain.compare.gradients
    python -m rltrain.compare.gradients --custom my_package.my_module:estimator --options '{gamma: 0.9}' --only grpo

Prints one table per family of problems and writes a picture. docs/estimators.md says what the columns are.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rltrain import cli
from rltrain.advantages.custom import CustomAdvantageConfig
from rltrain.advantages.verl_function import VerlFunctionConfig
from rltrain.compare.gradients.families import FAMILIES, Family, TabularPolicy
from rltrain.compare.gradients.judging import Sampling, judge_on, policy_of
from rltrain.compare.gradients.output import Cell, plot, table
from rltrain.compare.gradients.rows import Contender, contenders
from rltrain.errors import ConfigError, RunError, require
from rltrain.registry import discover


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rltrain.compare.gradients",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8, 16], help="group sizes")
    parser.add_argument("--completions", type=int, default=8192, help="samples per cell")
    parser.add_argument("--batch", type=int, default=256, help="completions per call of an estimator")
    parser.add_argument("--resamples", type=int, default=400, help="bootstrap resamples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--custom", nargs="+", default=[], metavar="MODULE:FUNCTION", help="estimators from outside")
    parser.add_argument("--verl", nargs="+", default=[], metavar="MODULE:FUNCTION", help="the same, written for verl")
    parser.add_argument("--options", default="{}", metavar="YAML", help="options of those from outside: '{gamma: 0.9}'")
    parser.add_argument("--import", nargs="+", default=[], dest="modules", help="modules that register estimators")
    parser.add_argument("--only", nargs="+", default=[], help="of the registered estimators those of a name or label")
    parser.add_argument(
        "--families", nargs="+", default=[], metavar="NAME", help="of the families those of these names"
    )
    parser.add_argument("--table", type=Path, help="also write the table to this file")
    parser.add_argument("--plot", type=Path, default=Path("runs/bench/estimators.png"))
    return parser.parse_args(words)


def options_of(text: str) -> dict[str, Any]:
    """A YAML mapping."""
    import yaml

    try:
        options = yaml.safe_load(text)
    except yaml.YAMLError:
        options = None
    if not isinstance(options, dict):
        raise ConfigError(f"--options {text}: not a YAML mapping; write '{{gamma: 0.9}}'")
    return options


def chosen_families(names: Sequence[str]) -> list[Family]:
    """The families of these names; all without names."""
    known = {family.name: family for family in FAMILIES}
    unknown = [name for name in names if name not in known]
    require(not unknown, f"--families {', '.join(unknown)}: unknown; choose among {', '.join(map(repr, known))}")
    return [known[name] for name in names or known]


def measured_cell(policy: TabularPolicy, row: Contender, sampling: Sampling) -> Cell:
    """What an estimator raises is the result of its row, for the others are no worse for it."""
    start, judgement, reason, crashed = time.perf_counter(), None, "", False
    try:
        judgement = judge_on(policy, row.estimator, sampling)
    except (ConfigError, RunError) as error:
        reason = str(error)
    except Exception as error:
        reason, crashed = f"{type(error).__name__}: {error}", True
        traceback.print_exc()
    return Cell(
        label=row.label,
        family=policy.family.name,
        group_size=sampling.group_size,
        judgement=judgement,
        reason=reason,
        crashed=crashed,
        seconds=time.perf_counter() - start,
    )


def measured(row: Contender, policies: Sequence[TabularPolicy], samplings: Sequence[Sampling]) -> list[Cell]:
    """All cells of a row: of each family up to the first that is refused, of all families up to one that crashed."""
    cells: list[Cell] = []
    for policy in policies:
        for sampling in samplings:
            cells.append(measured_cell(policy, row, sampling))
            if cells[-1].judgement is None:
                break
        if cells[-1].crashed:
            break
    return cells


def main(words: Sequence[str] | None = None) -> list[Cell]:
    """Print the table, write the plot."""
    arguments = parse(words)
    torch.set_num_threads(1)
    discover()
    for module in arguments.modules:
        importlib.import_module(module)
    sizes = {key: getattr(arguments, key) for key in ("completions", "batch", "resamples", "seed")}
    samplings = [Sampling(group_size=size, **sizes) for size in arguments.groups]
    options = options_of(arguments.options)
    outside = [
        *(CustomAdvantageConfig(import_path=path, options=options) for path in arguments.custom),
        *(VerlFunctionConfig(import_path=path, options=options) for path in arguments.verl),
    ]
    rows = contenders(outside, arguments.only)
    policies = [policy_of(family, arguments.seed) for family in chosen_families(arguments.families)]
    by_row = [measured(row, policies, samplings) for row in rows]
    cells = list(itertools.chain(*by_row))
    text = table(cells, policies)
    print(text)
    for row, of_row in zip(rows, by_row, strict=True):
        print(f"{row.label}: {sum(cell.seconds for cell in of_row):.1f} s", file=sys.stderr)
    if arguments.table:
        arguments.table.write_text(text.strip() + "\n", encoding="utf-8")
    if any(cell.judgement for cell in cells):
        plot(cells, arguments.plot)
    return cells


if __name__ == "__main__":
    with cli.errors_in_one_line():
        main()
