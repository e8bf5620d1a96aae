"""A comparison as tables, and as sentences that claim no more than the intervals show."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from rltrain.compare.comparison import Comparison, PairedDifference, Score, View
from rltrain.compare.statistics import Interval

FEWEST_PAIRS = 5


def number(value: float | None, digits: int, *, signed: bool = False) -> str:
    """The value with ``digits`` decimals, or a dash for None."""
    return "-" if value is None else f"{value:{'+' if signed else ''},.{digits}f}"


def interval(value: Interval | None, digits: int, *, signed: bool = False) -> str:
    """``0.801 [0.790, 0.812]``."""
    if value is None:
        return "-"
    estimate, low, high = (number(bound, digits, signed=signed) for bound in (value.estimate, value.low, value.high))
    return f"{estimate} [{low}, {high}]"


def percent(level: float) -> str:
    """``97.5 %``."""
    return f"{100 * level:.4g} %"


def sentences(comparison: Comparison) -> list[str]:
    """A sentence for each difference, and the scope of them all."""
    said = [
        sentence(view, difference, comparison.level) for view in comparison.views for difference in view.differences
    ]
    if not said:
        return ["There is one method only: nothing is compared."]
    return [*said, "All this is about further seeds of these settings, not about other models, data or settings."]


def sentence(view: View, difference: PairedDifference, level: float) -> str:
    """A difference in words: with a direction only if the interval excludes zero and there are enough pairs."""
    subject = f"{view.title}, {difference.method} minus {difference.baseline}"
    count = len(difference.pairs)
    if difference.mean is None:
        return f"{subject}: {count} shared seeds give no interval; nothing is shown."
    mean, low, high = (
        number(bound, view.digits, signed=True)
        for bound in (difference.mean.estimate, difference.mean.low, difference.mean.high)
    )
    summary = f"{subject}: {mean}, {percent(level)} interval {low} to {high}, {count} pairs."
    size = number(difference.detectable, view.digits)
    if count < FEWEST_PAIRS:
        return f"{summary} Fewer than {FEWEST_PAIRS} pairs: this decides nothing, whichever way it points."
    if difference.mean.excludes_zero:
        return f"{summary} {'Higher' if difference.mean.low > 0 else 'Lower'}: the interval excludes zero."
    return (
        f"{summary} No difference is shown, nor that there is none: "
        f"with 80 % probability so many pairs of this spread show one of {size} or more."
    )


def tables(comparison: Comparison) -> RenderableType:
    """Methods, then each view's scores and differences."""
    parts: list[RenderableType] = [_methods(comparison)]
    for view in comparison.views:
        parts += [_scores(view), *([_differences(view, comparison.level)] if view.differences else [])]
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _methods(comparison: Comparison) -> Table:
    table = _table(
        "Runs", "method", "runs", "seeds", f"{comparison.metric} at start", "s per step", "tokens per completion"
    )
    for method in comparison.methods:
        seeds = " ".join(map(str, method.seeds))
        numbers = number(method.start, 3), number(method.step_s, 2), number(method.length_tokens, 1)
        table.add_row(method.name, str(len(method.seeds)), seeds, *numbers)
    return table


def _scores(view: View) -> Table:
    table = _table(f"\n{view.title}", "method", "interquartile mean [95 %]", "mean", "sd", "reached")
    for score in view.scores:
        table.add_row(score.method, *_cells(score, view.digits))
    return table


def _cells(score: Score, digits: int) -> tuple[str, ...]:
    reached = "-" if score.reached is None else f"{score.reached} of {score.runs}"
    return interval(score.iqm, digits), number(score.mean, digits), number(score.std, digits), reached


def _differences(view: View, level: float) -> Table:
    columns = f"mean [{percent(level)}]", "sd", "shown with 80 %", f"P(higher) [{percent(level)}]"
    table = _table("", "paired difference", "pairs", *columns)
    for difference in view.differences:
        table.add_row(
            f"{difference.method} - {difference.baseline}",
            str(len(difference.pairs)),
            interval(difference.mean, view.digits, signed=True),
            number(difference.std, view.digits),
            number(difference.detectable, view.digits),
            interval(difference.probability_higher, 2),
        )
    return table
