"""Methods compared at each one's best learning rate, chosen on seeds other than those that it is judged on.

python -m rltrain.compare.rates RUNS

RUNS is the folder that ``scripts/reproduce/league.py --rates`` wrote. The table is printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rltrain import cli
from rltrain.compare.comparison import LEVEL
from rltrain.compare.league import BASELINE, RECORD, LeagueRun, points, read_run
from rltrain.compare.statistics import Interval, detectable, paired
from rltrain.errors import require

RATE = "optimizer.learning_rate="
Score = Callable[[LeagueRun], float]


@dataclass(frozen=True, kw_only=True)
class RatedRun:
    """A finished run and its learning rate."""

    rate: float
    run: LeagueRun


@dataclass(frozen=True, kw_only=True)
class AtBestRate:
    """A method on a task. ``chosen`` holds the rate that each half of the seeds chose for the other half.

    ``scores`` are by seed, each at the rate that the other half chose. ``difference`` is theirs from the baseline's,
    paired by seed; None for the baseline. ``by_rate`` is the mean over all seeds at each rate.
    """

    task: str
    method: str
    seeds: Sequence[int]
    chosen: tuple[float, float]
    scores: Mapping[int, float]
    by_rate: Mapping[float, float]
    difference: Interval | None
    detectable: float | None


def read_rated(folder: Path) -> list[RatedRun]:
    """The finished cells below ``folder``. ConfigError where there is none or a rate is missing from its words."""
    files = sorted(folder.glob(f"*/*/{RECORD}"))
    require(bool(files), f"{folder}: holds no finished cell ({RECORD}); run scripts/reproduce/league.py --rates first")
    return [RatedRun(rate=_rate(file), run=read_run(file.parent)) for file in files]


def _rate(file: Path) -> float:
    given = [word.removeprefix(RATE) for word in json.loads(file.read_text())["words"] if word.startswith(RATE)]
    require(bool(given), f"{file}: its words lack {RATE}; run the cell again")
    return float(given[-1])


def at_best_rates(runs: Sequence[RatedRun], score: Score, *, baseline: str = BASELINE) -> list[AtBestRate]:
    """Every method of every task, cross-fitted over two halves of the seeds.

    The seeds of a task are those with all its methods at all their rates, in order; the first half of the order takes
    every second of them. On each half a method's rate is that of the highest mean score, the lower one of two equal
    ones. Its runs on the other half count at that rate. So no run has a part in the choice of the rate that it is
    judged at, and every seed counts once. Tasks with fewer than four such seeds are left out. Differences have
    Student's t interval at 95 %.
    """
    made = []
    for task in dict.fromkeys(one.run.task for one in runs):
        cells: dict[str, dict[float, dict[int, float]]] = {}
        for one in runs:
            if one.run.task == task:
                cells.setdefault(one.run.method, {}).setdefault(one.rate, {})[one.run.seed] = score(one.run)
        seeds = complete_seeds(cells)
        if len(seeds) < 4 or baseline not in cells:
            continue
        base = cross_fitted(cells[baseline], seeds)[1]
        for method, of_rate in cells.items():
            chosen, scores = cross_fitted(of_rate, seeds)
            pairs = np.array([scores[seed] - base[seed] for seed in seeds])
            is_base = method == baseline
            found = None if is_base else detectable(float(pairs.std(ddof=1)), len(pairs), level=LEVEL)
            made.append(
                AtBestRate(
                    task=task,
                    method=method,
                    seeds=seeds,
                    chosen=chosen,
                    scores=scores,
                    by_rate={rate: _mean(of_seed, seeds) for rate, of_seed in sorted(of_rate.items())},
                    difference=None if is_base else paired(pairs, level=LEVEL),
                    detectable=found,
                )
            )
    return made


def complete_seeds(cells: Mapping[str, Mapping[float, Mapping[int, float]]]) -> list[int]:
    """The seeds that every method has at each of its rates, in order."""
    of_cell = [set(of_seed) for of_rate in cells.values() for of_seed in of_rate.values()]
    return sorted(set.intersection(*of_cell)) if of_cell else []


def cross_fitted(
    of_rate: Mapping[float, Mapping[int, float]], seeds: Sequence[int]
) -> tuple[tuple[float, float], dict[int, float]]:
    """The rates that the first and the second half of the seeds choose, and each seed's score at the other's rate."""
    first, second = seeds[::2], seeds[1::2]
    by_first, by_second = (_best(of_rate, half) for half in (first, second))
    scores = {seed: of_rate[by_second][seed] for seed in first} | {seed: of_rate[by_first][seed] for seed in second}
    return (by_first, by_second), scores


def _best(of_rate: Mapping[float, Mapping[int, float]], seeds: Sequence[int]) -> float:
    return max(sorted(of_rate), key=lambda rate: _mean(of_rate[rate], seeds))


def _mean(of_seed: Mapping[int, float], seeds: Sequence[int]) -> float:
    return float(np.mean([of_seed[seed] for seed in seeds]))


# --- words -----------------------------------------------------------------------------------------------------------


def table(mean: Sequence[AtBestRate], last: Sequence[AtBestRate]) -> str:
    """Both judgements as one Markdown table: over the run, and at its end."""
    heads = ["task", "method", "seeds", "at each rate", "chosen", "over the run", "minus GRPO", "detectable"]
    heads += ["at the end minus GRPO"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row, end in zip(mean, last, strict=True):
        cells = [row.task, row.method, str(len(row.seeds)), _by_rate(row), _chosen(row)]
        cells += [f"{100 * float(np.mean(list(row.scores.values()))):.1f}", _strong(row.difference)]
        cells += ["–" if row.detectable is None else f"{100 * row.detectable:.1f}", _strong(end.difference)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_rate(row: AtBestRate) -> str:
    return ", ".join(f"{rate:g}: {100 * value:.1f}" for rate, value in row.by_rate.items())


def _chosen(row: AtBestRate) -> str:
    return " and ".join(f"{rate:g}" for rate in dict.fromkeys(row.chosen))


def _strong(value: Interval | None) -> str:
    text = points(value, signed=True)
    return f"**{text}**" if value is not None and value.excludes_zero else text


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, choose, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    options = parser.parse_args(arguments)
    runs = read_rated(options.runs)
    print(table(*(at_best_rates(runs, score) for score in (mean_over_the_run, at_the_end))))


def mean_over_the_run(run: LeagueRun) -> float:
    """The metric's mean over the run's steps."""
    return run.mean


def at_the_end(run: LeagueRun) -> float:
    """The metric's last value."""
    return float(run.values[-1])


if __name__ == "__main__":
    with cli.errors_in_one_line():
        main()
