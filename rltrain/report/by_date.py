"""The audit by date: what a model scores on problems from before a cut-off and from after it, with intervals.

A model that has seen a public test set does better on what was public before its training data ended. A gap alone is no
proof: later problems may be harder. The completion of cut questions tells more (arXiv 2507.10532, 2504.14765).
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rltrain.compare.statistics import Interval
from rltrain.errors import require
from rltrain.report.intervals import of_difference, of_mean
from rltrain.runtime.dates import NO_DATE, side
from rltrain.types import Problem

SIDES = ("before", "after")
NAMED = 20  # rows without a date that the report names


def sorted_by_date(problems: Sequence[Problem], field: str, cutoff: datetime.date) -> dict[str, list[Problem]]:
    """The problems ``before`` and ``after`` the cut-off; under another key those on neither side, by the reason."""
    found: dict[str, list[Problem]] = {name: [] for name in SIDES}
    for problem in problems:
        found.setdefault(side(problem.meta.get(field, ""), cutoff), []).append(problem)
    return found


def require_both(found: Mapping[str, Sequence[Problem]], field: str) -> None:
    """``ConfigError`` unless both sides have a problem."""
    dated = [problem for reason, rows in found.items() if reason != NO_DATE for problem in rows]
    require(
        bool(dated),
        f"audit.date_field={field}: no problem of the test split has a date there; name its column, "
        f"+data.meta.{field}=COLUMN, with dates such as 2024-07-26",
    )
    for name in SIDES:
        require(
            bool(found[name]),
            f"audit.cutoff: no problem of the test split is from {name} it; set another day",
        )


def undated(found: Mapping[str, Sequence[Problem]], left_out: Sequence[str]) -> dict[str, Any]:
    """Rows on neither side by reason: how many, and the first NAMED ids. ``left_out`` are rows of an empty date."""
    ids = {reason: [problem.id for problem in rows] for reason, rows in found.items() if reason not in SIDES}
    if left_out:
        ids["left out of the data, its date is empty"] = list(left_out)
    return {reason: {"count": len(rows), "ids": rows[:NAMED]} for reason, rows in ids.items()}


def compared(values: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, Any]]:
    """Of each measure: means before and after and the difference after - before, each with a 95 % interval.

    ``values[side][measure]`` is a value per problem. NaN, a problem that could not be measured, is left out.
    """
    measures = {}
    for name in values["before"]:
        before, after = ([each for each in values[which][name] if not math.isnan(each)] for which in SIDES)
        intervals = {"before": of_mean(before), "after": of_mean(after), "difference": of_difference(before, after)}
        counts = {"before": len(before), "after": len(after)}
        measures[name] = {"n": counts} | {key: _plain(interval) for key, interval in intervals.items()}
    return measures


def _plain(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else asdict(interval)


def table(measures: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per measure."""
    cells = {
        name: [_cell(row["before"]), _cell(row["after"]), _cell(row["difference"], sign="+")]
        for name, row in measures.items()
    }
    heads = ["before the cut-off", "after it", "difference"]
    lines = [f"{'':20s}" + "".join(f"{head:>28s}" for head in heads)]
    return "\n".join([*lines, *(f"{name:20s}" + "".join(f"{c:>28s}" for c in row) for name, row in cells.items())])


def _cell(interval: Mapping[str, float] | None, sign: str = "") -> str:
    if interval is None:
        return "-"
    return f"{interval['estimate']:{sign}.3f} ({interval['low']:{sign}.3f} to {interval['high']:{sign}.3f})"
