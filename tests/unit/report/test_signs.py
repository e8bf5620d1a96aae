"""The panel on signs: stages, rules that choose one of n, against accuracies worked out by hand."""

import math

import pytest

from rltrain.compare.statistics import Interval
from rltrain.report.signs import RULES, SignedCompletion, in_percent, selections, signed, stage_signs, thirds


def one(right, length, repeats=0.0, failed=None, text="", mismatch=None):
    return SignedCompletion(right=right, length=length, repeats=repeats, failed=failed, text=text, mismatch=mismatch)


GROUP = [
    one(True, 5, repeats=0.2, failed=0.5, text="\\boxed{1}"),
    one(False, 3, repeats=0.0, failed=0.0, text="\\boxed{2}"),
    one(True, 3, repeats=0.0, failed=None, text="\\boxed{1}"),
]


@pytest.mark.parametrize(("rule", "accuracy"), [
    ("shortest", 0.5), ("fewest repeats", 0.5), ("fewest failed steps", 0.0), ("majority", 1.0),
])  # fmt: skip
def test_what_each_rule_chooses(rule, accuracy):
    assert RULES[rule](GROUP) == accuracy


def test_gains_are_paired_by_group():
    """Shortest: right in the first group (1/2 at random) and in the second (1/2), so the gain is 1/2 in both."""
    first = [one(True, 2), one(False, 9)]
    found = {each.rule: each for each in selections([first, [one(True, 1), one(False, 4)], [one(True, 1)]])}
    assert "fewest failed steps" not in found  # nothing was probed
    assert (found["shortest"].groups, found["shortest"].accuracy.estimate) == (2, 1.0)
    assert (found["shortest"].gain.estimate, found["shortest"].gain.low) == (0.5, 0.5)
    assert found["fewest repeats"].gain is None  # all are equal, which is one at random


def test_stages():
    assert thirds([10, 20]) == {"all": [10, 20]}
    assert thirds([]) == {}
    assert thirds(list(range(1, 31))) == {"early": [1, 4, 7, 10], "middle": [11, 14, 17, 20], "late": [21, 24, 27, 30]}


def test_means_of_a_stage_are_of_right_and_wrong_completions():
    made = [one(True, 1, repeats=0.25), one(True, 1, repeats=0.75), one(False, 1, repeats=1.0, mismatch=True)]
    stage = stage_signs("early", [1, 5], made)
    right, wrong = stage.means["repeated tokens"]
    assert (stage.completions, right.estimate, wrong) == (3, 0.5, None)  # an interval needs two
    assert "failed steps" not in stage.means


def test_rows_of_a_samples_file():
    row = {"problem_id": "p", "completion": "2 \\boxed{3}", "token_ids": [7] * 12, "logprobs": [0.0] * 12}
    rows = [
        {**row, "sample": 0, "right": 1.0, "note/step_potential": [0.5, 0.1, 0.5]},
        {**row, "sample": 1, "right": math.nan},
    ]
    (only,) = signed(rows)
    assert (only.right, only.length, only.repeats, only.mismatch) == (True, 12, 11 / 12, True)
    assert only.failed == pytest.approx(1 / 3)


def test_in_percent():
    assert in_percent(Interval(estimate=0.5, low=0.25, high=0.75)) == ("50.0 %", "25.0 to 75.0")
    assert in_percent(None) == ("–", "")
