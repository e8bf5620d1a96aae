"""A run's end: which held-out metric its picture shows."""

import pytest

from rltrain.runs.summary import held_out_metric, plot_curves


def rows(accuracy, reward):
    return [{"step": 0, "reward": reward, "eval_accuracy": accuracy, "eval_reward": reward}]


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ({"a": rows(0.0, -1.0)}, "eval_reward"),
        ({"a": rows(0.0, 0.0), "b": rows(0.2, 0.2)}, "eval_accuracy"),
        ({"a": [{"step": 1, "reward": 0.5}]}, "eval_reward"),
    ],
)
def test_rewards_by_which_nothing_is_right_are_shown_themselves(runs, expected):
    assert held_out_metric(runs) == expected


@pytest.mark.parametrize(("reward", "bottom"), [(-1.5, None), (0.5, 0.0)])
def test_negative_rewards_are_inside_the_picture(reward, bottom, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    plot_curves({"a": rows(0.0, reward)}, tmp_path / "curve.png")
    for axes in drawn[0].axes:
        low = axes.get_ylim()[0]
        assert low == bottom if bottom is not None else low < reward
