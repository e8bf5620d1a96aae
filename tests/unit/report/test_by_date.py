"""The audit by date: which side a row is on, intervals against published numbers, and the command on a small file."""

import datetime
import json
import math

import pytest
import torch
from scipy import stats
from tiny_run import config as tiny_config

from rltrain import audit, cli
from rltrain.errors import ConfigError
from rltrain.report.by_date import compared, sorted_by_date, table, undated
from rltrain.report.intervals import of_difference
from rltrain.runtime.dates import side
from rltrain.types import Problem

CUTOFF = datetime.date(2024, 7, 15)


@pytest.mark.parametrize(("value", "expected"), [
    ("2024-07-14", "before"), ("2024-07-15", "after"), ("2024-07-15T08:00:00Z", "after"), ("2024-06", "before"),
    ("2024-07", "spans the cut-off"), ("2024", "spans the cut-off"), (2023, "before"), ("2025", "after"),
    (datetime.date(2024, 7, 14), "before"), (datetime.datetime(2024, 7, 15, 1), "after"),
    ("", "no date"), ("July 2024", "no date"), ("2024-13-01", "no date"), ("2023-02-30", "no date"), (None, "no date"),
    ("2024-13", "no date"), ("0000", "no date"),
])  # fmt: skip
def test_the_side_of_a_date(value, expected):
    assert side(value, CUTOFF) == expected


def test_newcombes_interval_of_two_shares():
    """56/70 against 48/80, Newcombe (1998), method 10: 0.2000, 0.0524 to 0.3339."""
    found = of_difference([1.0] * 48 + [0.0] * 32, [1.0] * 56 + [0.0] * 14)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_welchs_interval_is_that_of_scipy():
    before, after = [0.1, 0.5, 0.9, 0.3], [0.8, 0.6, 0.95, 0.7, 0.2]
    found = of_difference(before, after)
    interval = stats.ttest_ind(after, before, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert of_difference([0.5], after) is None
    assert of_difference([0.5, 0.5], [0.25, 0.25]).high == -0.25


def problem(number, day):
    return Problem(id=f"p{number}", prompt="q", answer="1", meta={} if day is None else {"date": day})


def test_rows_on_neither_side_are_named_and_counted():
    problems = [problem(number, day) for number, day in enumerate(["2024-01-01", None, "2024-07", "2025", "soon"])]
    found = sorted_by_date(problems, "date", CUTOFF)
    assert [[one.id for one in found[name]] for name in ("before", "after")] == [["p0"], ["p3"]]
    assert undated(found, ["test-7"]) == {
        "no date": {"count": 2, "ids": ["p1", "p4"]},
        "spans the cut-off": {"count": 1, "ids": ["p2"]},
        "left out of the data, its date is empty": {"count": 1, "ids": ["test-7"]},
    }


def test_measures_leave_out_what_could_not_be_judged():
    values = {"before": {"accuracy": [1.0, 1.0, math.nan, 0.0]}, "after": {"accuracy": [0.0, 0.0]}}
    measures = compared(values)
    assert measures["accuracy"]["n"] == {"before": 3, "after": 2}
    assert measures["accuracy"]["difference"]["estimate"] == pytest.approx(-2 / 3)
    assert table(measures).splitlines()[1].startswith("accuracy                  0.667 (0.208 to 0.939)")


@pytest.mark.parametrize(("overrides", "message"), [
    (["audit.date_field=date"], "audit.date_field=date with audit.cutoff=None: one without the other has no effect"),
    (["audit.date_field=date", "audit.cutoff=July"], "audit.cutoff=July: not a date; give it as 2024-07-26"),
])  # fmt: skip
def test_bad_keys_are_refused(overrides, message):
    with pytest.raises(ConfigError) as error:
        cli.compose(overrides)
    assert message in str(error.value)


@pytest.fixture
def overrides(tmp_path):
    days = ["2023-05-01"] * 4 + ["2025-01-02"] * 4 + ["", "2024"]
    rows = [{"q": f"{n}+1=?", "a": str(n + 1), "day": day} for n, day in enumerate(days)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data=hub", f"data.path={tmp_path / 'rows.jsonl'}", 'data.prompt="{q}"', "data.answer=a"]
    return [*words, "data.test_split=train", "+data.meta.date=day", "audit.date_field=date", "audit.cutoff=2024-07-01"]


def test_the_command_compares_both_sides(tmp_path, capsys, overrides):
    config = tiny_config(tmp_path / "run", *overrides, "sampling.max_new_tokens=4")
    with torch.no_grad():
        audit.main(config, limit=100, probes=3)
    found = json.loads((tmp_path / "run" / "audit.json").read_text())["by_date"]
    assert found["problems"] == {"before": 4, "after": 4}
    assert {reason: rows["count"] for reason, rows in found["undated"].items()} == {
        "spans the cut-off": 1, "left out of the data, its date is empty": 1
    }  # fmt: skip
    assert found["undated"]["left out of the data, its date is empty"]["ids"] == ["train-8"]
    assert found["measures"]["accuracy"]["n"] == {"before": 3, "after": 3}
    assert {*found["measures"]} >= {"accuracy", "rouge_l at 40%", "exact at 60%", "answered at 80%"}
    assert "date: 4 problems from before 2024-07-01, 4 from then on" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(tmp_path, overrides):
    with pytest.raises(ConfigError, match="add --probe N and model="):
        audit.main(tiny_config(tmp_path / "run", *overrides), limit=9, probes=0)
    empty = sorted_by_date([problem(0, None)], "date", CUTOFF)
    with pytest.raises(ConfigError, match=r"no problem of the test split has a date there; name its column"):
        audit.dates.require_both(empty, "date")
    with pytest.raises(ConfigError, match=r"audit\.cutoff: no problem of the test split is from after it"):
        audit.dates.require_both(sorted_by_date([problem(0, "2020")], "date", CUTOFF), "date")
