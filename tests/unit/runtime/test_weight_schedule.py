"""Schedules of a reward's weight against numbers worked out by hand."""

import pytest

from rltrain import cli
from rltrain.errors import ConfigError
from rltrain.runtime.weight_schedule import check, value_at

LINEAR = {"linear": [[10, 1.0], [20, 3.0], [40, 0.0]]}
STEPS = {"steps": [[0, 1.0], [5, 0.25]]}


@pytest.mark.parametrize(("value", "step", "weight"), [
    (0.5, 7, 0.5),
    (LINEAR, 0, 1.0), (LINEAR, 10, 1.0), (LINEAR, 15, 2.0), (LINEAR, 20, 3.0), (LINEAR, 25, 2.25), (LINEAR, 99, 0.0),
    (STEPS, 0, 1.0), (STEPS, 4, 1.0), (STEPS, 5, 0.25), (STEPS, 500, 0.25),
    ({"steps": [[3, 2.0]]}, 0, 2.0),
])  # fmt: skip
def test_the_weight_of_a_step(value, step, weight):
    check("rewards.x.weight", value)
    assert value_at(value, step) == weight


@pytest.mark.parametrize(("override", "message"), [
    ("rewards.answer.weight=high", "rewards.answer.weight=high: is no number and no schedule; set a number, or"),
    ("rewards.answer.weight=true", "rewards.answer.weight=True: is no number"),
    ("rewards.answer.weight={cosine: [[0, 1.0]]}", "a schedule is linear or steps"),
    ("rewards.answer.weight={linear: [0, 1.0]}", "rewards.answer.weight.linear=[0, 1.0]: is no list of [step, number]"),
    ("rewards.answer.weight={linear: []}", "rewards.answer.weight.linear=[]: is no list of [step, number]"),
    ("rewards.answer.weight={linear: [[0.5, 1.0]]}", "0.5 is no step; give whole numbers from 0"),
    ("rewards.answer.weight={linear: [[9, 1.0], [3, 2.0]]}", "the steps [9, 3] do not rise"),
    ("rewards.answer.weight={steps: [[3, inf]]}", "rewards.answer.weight.steps: inf at step 3 is not finite"),
])  # fmt: skip
def test_what_is_no_schedule_is_refused(override, message):
    with pytest.raises(ConfigError) as error:
        cli.compose([override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_settled_weight_is_that_of_its_step():
    reward = cli.compose(["rewards.answer.weight={linear: [[0, 0.0], [10, 1.0]]}"]).rewards["answer"]
    assert (reward.weight_at(5), reward.settled(5).weight, reward.settled(5).weight_at(9)) == (0.5, 0.5, 0.5)
