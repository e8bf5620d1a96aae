"""The league as one page: methods by tasks, what can be told apart from the baseline and what cannot.

python -m rltrain.compare.league RUNS [--brief] [--page PAGE.md] [--plot PICTURE.png]

RUNS is the folder of scripts/reproduce/league.py. Without --page the tables are printed as Markdown. With it they
replace what stands between the page's marks. --brief makes one table of the differences alone, with other marks, as
for the same methods at another rate.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rltrain import cli
from rltrain.compare.comparison import LEVEL
from rltrain.compare.folders import Curve, read_curve
from rltrain.compare.statistics import Interval, bootstrap, detectable, interquartile_mean, paired
from rltrain.compare.words import FEWEST_PAIRS
from rltrain.errors import RunError, require
from rltrain.runs.metrics import read_jsonl

RECORD = "league.json"
BASELINE = "GRPO"
METRIC = "eval_accuracy"
BEGIN, END = "<!-- league: begin -->", "<!-- league: end -->"
BRIEF_BEGIN, BRIEF_END = "<!-- league, brief: begin -->", "<!-- league, brief: end -->"
NOT_RUN = "not run"


@dataclass(frozen=True, kw_only=True)
class LeagueRun:
    """A finished cell: its curve over steps, and the generated tokens."""

    task: str
    method: str
    seed: int
    steps: np.ndarray
    values: np.ndarray
    tokens: float

    @property
    def mean(self) -> float:
        """The metric's mean over the run: the area under straight lines between the evaluations, by its steps."""
        widths = np.diff(self.steps)
        return float((widths * (self.values[1:] + self.values[:-1]) / 2).sum() / widths.sum())

    def steps_to(self, level: float) -> float | None:
        """Steps until the lines first reach ``level``, or None."""
        return self._curve().completions_to(level)

    def _curve(self) -> Curve:
        empty = np.zeros(len(self.steps))
        return Curve(
            folder=Path(), method=self.method, task=self.task, seed=self.seed, completions=self.steps, seconds=empty,
            values=self.values,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A method on a task. Differences are paired by seed with the baseline, in the metric's mean over the run.

    ``mean`` is the interquartile mean over seeds, ``last`` that of the last evaluation. ``ratio`` is the steps to the
    task's level over the baseline's, a geometric mean over the pairs in which both reached it (``reached`` of them),
    None below five. ``start`` is the mean before the first step, ``end`` that of the last evaluation. ``tokens`` is the
    ratio of generated tokens.
    """

    task: str
    method: str
    seeds: Sequence[int]
    mean: Interval
    last: Interval
    difference: Interval | None
    detectable: float | None
    ratio: Interval | None
    reached: int
    start: float
    end: float
    tokens: float

    @property
    def verdict(self) -> str:
        """``higher``, ``lower``, or ``open`` where the interval holds zero or there are fewer than five pairs."""
        if self.difference is None or len(self.seeds) < FEWEST_PAIRS or not self.difference.excludes_zero:
            return "open"
        return "higher" if self.difference.low > 0 else "lower"


def read_runs(folder: Path) -> list[LeagueRun]:
    """The finished cells below ``folder``, in order of their folders' names; not those of ``rates``."""
    files = [file for file in sorted(folder.glob(f"*/*/{RECORD}")) if file.parents[1].name != "rates"]
    require(bool(files), f"{folder}: holds no finished cell ({RECORD}); run scripts/reproduce/league.sh first")
    return [read_run(file.parent) for file in files]


def read_run(folder: Path) -> LeagueRun:
    """A finished cell. RunError where its metrics cannot be read."""
    record = json.loads((folder / RECORD).read_text())
    curve = read_curve(folder, by=("name",), metric=METRIC, task=(), partial=False)
    if isinstance(curve, str):
        raise RunError(f"{folder}: {curve}; delete {RECORD} there and run scripts/reproduce/league.sh again")
    rows = read_jsonl(folder / "metrics.jsonl")
    drawn = [row.get("completions/tokens", 0.0) + row.get("continuations/tokens", 0.0) for row in rows]
    return LeagueRun(
        task=record["task"],
        method=record["method"],
        seed=record["seed"],
        steps=np.array([row["step"] for row in rows if row.get(METRIC) is not None], dtype=float),
        values=curve.values,
        tokens=float(sum(drawn)),
    )


def standings(runs: Sequence[LeagueRun], *, baseline: str = BASELINE) -> list[Standing]:
    """Every method on every task that the baseline has run on, the baseline included.

    Intervals of differences and ratios are at ``1 - 0.05/k`` for the k other methods of a task (Bonferroni).
    """
    made = []
    for task in dict.fromkeys(run.task for run in runs):
        cells: dict[str, dict[int, LeagueRun]] = {}
        for run in runs:
            if run.task == task:
                cells.setdefault(run.method, {})[run.seed] = run
        base = cells.get(baseline)
        if base is None:
            continue
        level = 1 - (1 - LEVEL) / max(1, len(cells) - 1)
        made += [standing(of_seed, base, level=level) for of_seed in cells.values()]
    return made


def standing(of_seed: Mapping[int, LeagueRun], base: Mapping[int, LeagueRun], *, level: float) -> Standing:
    """A method's runs by seed against the baseline's."""
    seeds = sorted(of_seed.keys() & base.keys())
    reach = level_of(list(base.values()))
    pairs = np.array([of_seed[seed].mean - base[seed].mean for seed in seeds])
    steps = [(of_seed[seed].steps_to(reach), base[seed].steps_to(reach)) for seed in seeds]
    logs = np.array([np.log(ours / theirs) for ours, theirs in steps if ours and theirs])
    ratio = paired(logs, level=level) if len(logs) >= FEWEST_PAIRS else None
    first = next(iter(of_seed.values()))
    shared = [of_seed[seed] for seed in seeds]
    is_base = of_seed is base
    return Standing(
        task=first.task,
        method=first.method,
        seeds=seeds,
        mean=bootstrap([np.array([run.mean for run in of_seed.values()])], interquartile_mean, level=LEVEL),
        last=bootstrap([np.array([run.values[-1] for run in of_seed.values()])], interquartile_mean, level=LEVEL),
        difference=None if is_base else paired(pairs, level=level),
        detectable=None if is_base or len(pairs) < 2 else detectable(float(pairs.std(ddof=1)), len(pairs), level=level),
        ratio=None if is_base or ratio is None else exponentiated(ratio),
        reached=len(logs),
        start=float(np.mean([run.values[0] for run in of_seed.values()])),
        end=float(np.mean([run.values[-1] for run in of_seed.values()])),
        tokens=float(np.mean([run.tokens / base[run.seed].tokens for run in shared])) if shared else float("nan"),
    )


def level_of(base: Sequence[LeagueRun]) -> float:
    """Half-way from the baseline's mean start to its mean end."""
    return float(np.mean([run.values[0] for run in base]) + np.mean([run.values[-1] for run in base])) / 2


def exponentiated(value: Interval) -> Interval:
    """An interval of logarithms as one of ratios."""
    return Interval(
        estimate=float(np.exp(value.estimate)), low=float(np.exp(value.low)), high=float(np.exp(value.high))
    )


# --- words -----------------------------------------------------------------------------------------------------------


def points(value: Interval | None, *, signed: bool = False) -> str:
    """``+1.2 (-0.3 to +2.7)`` in points of 100."""
    if value is None:
        return "–"
    sign = "+" if signed else ""
    low, high = (f"{100 * bound:{sign}.1f}" for bound in (value.low, value.high))
    return f"{100 * value.estimate:{sign}.1f} ({low} to {high})"


def ratios(value: Interval | None) -> str:
    """``0.91 (0.80 to 1.03)``."""
    return "–" if value is None else f"{value.estimate:.2f} ({value.low:.2f} to {value.high:.2f})"


def task_table(rows: Sequence[Standing], methods: Sequence[str]) -> list[str]:
    """A task's methods as a Markdown table; those without a finished cell are marked."""
    heads = ["method", "seeds", "mean over the run", "minus GRPO", "detectable", "last", "steps to level / GRPO's"]
    heads += ["tokens / GRPO's"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    by_method = {row.method: row for row in rows}
    for method in methods:
        if (row := by_method.get(method)) is None:
            lines.append(f"| {method} | {NOT_RUN} |" + " |" * (len(heads) - 2))
            continue
        difference = points(row.difference, signed=True)
        strong = f"**{difference}**" if row.verdict != "open" else difference
        reach = f"{ratios(row.ratio)}, {row.reached} pairs" if row.method != BASELINE else "–"
        cells = [method, str(len(row.seeds)), points(row.mean), strong]
        cells += ["–" if row.detectable is None else f"{100 * row.detectable:.1f}", points(row.last), reach]
        cells += [f"{row.tokens:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def summary(rows: Sequence[Standing]) -> list[str]:
    """A sentence for each task: what is above the baseline, what below, and what cannot be told apart."""
    said = []
    for task in dict.fromkeys(row.task for row in rows):
        others = [row for row in rows if row.task == task and row.difference is not None]
        if not others:
            said.append(f"- **{task}**: too few seeds for an interval.")
            continue
        base = next(row for row in rows if row.task == task and row.method == BASELINE)
        rise = f"{BASELINE} {100 * base.start:.1f} to {100 * base.end:.1f} %, {len(base.seeds)} seeds"
        parts = [
            f"{verdict} than {BASELINE}: {', '.join(f'{row.method} {_gain(row)}' for row in chosen)}"
            for verdict in ("higher", "lower")
            if (chosen := [row for row in others if row.verdict == verdict])
        ]
        unsure = [row for row in others if row.verdict == "open"]
        smallest = [row.detectable for row in unsure if row.detectable is not None]
        if unsure:
            bound = (
                f" (the design finds {100 * min(smallest):.1f} to {100 * max(smallest):.1f} points)" if smallest else ""
            )
            parts.append(f"not told apart: {', '.join(row.method for row in unsure)}{bound}")
        said.append(f"- **{task}** ({rise}): {'. '.join(part[0].upper() + part[1:] for part in parts)}.")
    return said


def _gain(row: Standing) -> str:
    assert row.difference is not None
    return f"({100 * row.difference.estimate:+.1f} points)"


def page(rows: Sequence[Standing], methods: Sequence[str], tasks: Sequence[str]) -> str:
    """The page's generated part: the sentences, then a table for each task."""
    lines = ["", *summary(rows), ""]
    for task in tasks:
        of_task = [row for row in rows if row.task == task]
        lines += [f"### {task[0].upper()}{task[1:]}", ""]
        lines += [*(task_table(of_task, methods) if of_task else [f"{NOT_RUN.capitalize()}."]), ""]
    return "\n".join(lines)


def brief(rows: Sequence[Standing], methods: Sequence[str], tasks: Sequence[str]) -> str:
    """A table of methods by tasks: the difference with its interval, then the detectable one. The baseline's mean."""
    lines = ["", f"| method | {' | '.join(tasks)} |", "|---|" + "---|" * len(tasks)]
    found = {(row.method, row.task): row for row in rows}
    for method in methods:
        cells = [_brief_cell(found.get((method, task))) for task in tasks]
        lines += [f"| {' | '.join([method, *cells])} |"]
    return "\n".join([*lines, ""])


def _brief_cell(row: Standing | None) -> str:
    if row is None:
        return NOT_RUN
    if row.detectable is None:
        return f"{points(row.mean)}, {len(row.seeds)} seeds"
    difference = points(row.difference, signed=True)
    strong = f"**{difference}**" if row.verdict != "open" else difference
    return f"{strong}, detectable {100 * row.detectable:.1f}"


def replaced(text: str, generated: str, *, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """The page with another generated part. ConfigError where it has no marks."""
    begin, end = marks
    require(begin in text and end in text, f"--page: lacks the lines {begin} and {end}; add them where tables belong")
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n{generated}\n{end}{rest.split(end, 1)[1]}"


# --- picture ---------------------------------------------------------------------------------------------------------


def heat_map(rows: Sequence[Standing], methods: Sequence[str], tasks: Sequence[str], path: Path) -> None:
    """Method by task: the difference from the baseline in points; bold where its interval excludes zero."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    others = [method for method in methods if method != BASELINE]
    found = {(row.method, row.task): row for row in rows if row.difference is not None}
    values = np.full((len(others), len(tasks)), np.nan)
    for (method, task), row in found.items():
        if method in others and task in tasks and row.difference is not None:
            values[others.index(method), tasks.index(task)] = 100 * row.difference.estimate
    figure, axes = plt.subplots(figsize=(2.2 + 1.5 * len(tasks), 1.2 + 0.5 * len(others)), layout="constrained")
    bound = max(1.0, float(np.nanmax(np.abs(values)))) if np.isfinite(values).any() else 1.0
    shown = axes.imshow(values, cmap="RdYlGn", vmin=-bound, vmax=bound, aspect="auto")
    axes.set_facecolor("lightgrey")
    for i, method in enumerate(others):
        for j, task in enumerate(tasks):
            _label(axes, j, i, found.get((method, task)))
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_yticks(range(len(others)), others)
    axes.set_title(f"accuracy over the run minus {BASELINE}'s, points\nbold: the interval excludes zero", fontsize=10)
    figure.colorbar(shown, ax=axes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _label(axes: Any, x: int, y: int, row: Standing | None) -> None:
    if row is None or row.difference is None:
        axes.text(x, y, NOT_RUN, ha="center", va="center", fontsize=8, color="grey")
        return
    weight = "bold" if row.verdict != "open" else "normal"
    half = 50 * (row.difference.high - row.difference.low)
    text = f"{100 * row.difference.estimate:+.1f} ± {half:.1f}"
    axes.text(x, y, text, ha="center", va="center", fontsize=8, fontweight=weight)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, judge, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--page", type=Path, help="a Markdown page with the marks; its generated part is replaced")
    parser.add_argument("--brief", action="store_true", help="one table of the differences alone, and no picture")
    parser.add_argument("--plot", type=Path, help="the heat map (default: league.png in RUNS)")
    parser.add_argument("--tasks", default="", help="further tasks to name as not run, between commas")
    parser.add_argument("--methods", default="", help="further methods to name as not run, between commas")
    options = parser.parse_args(arguments)
    runs = read_runs(options.runs)
    rows = standings(runs)
    tasks, methods = (
        list(dict.fromkeys([*(name.strip() for name in named.split(",") if name.strip()), *have]))
        for named, have in (
            (options.tasks, [run.task for run in runs]),
            (options.methods, [run.method for run in runs]),
        )
    )
    rows.sort(key=lambda row: (tasks.index(row.task), methods.index(row.method)))
    if not options.brief:
        heat_map(rows, methods, tasks, options.plot or options.runs / "league.png")
    generated = (brief if options.brief else page)(rows, methods, tasks)
    marks = (BRIEF_BEGIN, BRIEF_END) if options.brief else (BEGIN, END)
    if options.page is None:
        print(generated)
    else:
        options.page.write_text(replaced(options.page.read_text(), generated, marks=marks))


if __name__ == "__main__":
    with cli.errors_in_one_line():
        main()
