"""The panel of the introspection head, and calibration by hand."""

import json
import math

import pytest

from rltrain.report.folder import RecordedRun
from rltrain.report.predictions import adaptive_rows, calibration_chart
from rltrain.runs.calibration import CalibrationBin, calibration, expected_calibration_error

ROW = {"budget": 40.0, "price": 0.01, "tokens": 39.0, "problems": 100.0, "completions": 1.5}
ROW |= {"accuracy": 0.6, "accuracy_se": 0.05, "majority": 0.5, "majority_se": 0.05}
ROW |= {"gain_over_majority": 0.1, "gain_over_majority_se": 0.02, "gain_over_weighted_vote": 0.0}
ROW |= {"gain_over_weighted_vote_se": 0.01}


def test_bins_and_their_error_by_hand():
    found = calibration([0.05, 0.15, 0.12, 1.0, math.nan], [0.0, 1.0, 0.0, 1.0, 1.0])
    assert [(each.predicted, each.observed, each.count) for each in found] == [
        (0.05, 0.0, 1),
        (pytest.approx(0.135), 0.5, 2),
        (1.0, 1.0, 1),
    ]
    # (1·0.05 + 2·0.365 + 0) / 4
    assert expected_calibration_error(found) == pytest.approx(0.195)
    assert math.isnan(expected_calibration_error([]))


def test_the_chart_has_the_diagonal_and_a_point_per_bin():
    chart = calibration_chart([CalibrationBin(predicted=0.25, observed=0.5, count=4)])
    diagonal, line = chart.lines
    (x0, y0), (x1, y1) = [tuple(map(float, pair.split(","))) for pair in diagonal.points.split()]
    assert line.dots == [pytest.approx((x0 + 0.25 * (x1 - x0), y0 + 0.5 * (y1 - y0)), abs=0.1)]
    assert chart.words == ["0.25: 0.50 of 4"]


def test_adaptive_sampling_is_read_from_the_evaluation(tmp_path):
    run = RecordedRun(path=tmp_path, label="run", config={}, provenance={}, rows=[])
    assert adaptive_rows(run) == []
    (tmp_path / "evaluation.json").write_text(json.dumps({"adaptive": [ROW]}))
    (found,) = adaptive_rows(run)
    assert (found.tokens, found.problems) == (39.0, 100)
    assert found.gain_over_majority.low == pytest.approx(0.1 - 1.959964 * 0.02)
    (tmp_path / "evaluation.json").write_text("{")
    assert adaptive_rows(run) == []
    assert run.notes == ["evaluation.json cannot be read (JSONDecodeError); it may be torn"]
