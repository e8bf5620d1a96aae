"""A user's reward that fails: the end of a run at its first step, later a counted failure; never a silent zero."""

import pytest
from tiny_run import config, metrics

from rltrain import trainer
from rltrain.rewards.failures import RewardError


def run_with(function: str, run_dir, *overrides: str, name: str = "broken") -> list[dict]:
    broken = [f"+reward@rewards.{name}=custom", f"rewards.{name}.import_path=user_rewards:{function}"]
    trainer.fit(config(run_dir, *broken, "steps=2", *overrides))
    return metrics(run_dir)[1:]


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        ("raises", "RuntimeError: the grader's server is down"),
        ("one_short", "returned [3, 3, 3, 3] scores per group, expected [4, 4, 4, 4]"),
        ("leaves", "SystemExit: 3"),
    ],
)
def test_a_reward_that_fails_on_all_of_the_first_step_ends_the_run_before_an_update(function, cause, tmp_path):
    with pytest.raises(RewardError) as caught:
        run_with(function, tmp_path / "run", "evaluation.every_steps=0")
    message = f"reward broken: failed on every completion of the first step ({cause}); mend the function, or leave"
    assert str(caught.value).startswith(message)
    assert metrics(tmp_path / "run") == [{"step": 0}]


@pytest.mark.parametrize("function", ["raises_later", "one_short_later", "leaves_later"])
def test_a_reward_that_fails_later_takes_its_completions_out_and_the_run_goes_on(function, tmp_path):
    first, second = run_with(function, tmp_path / "run", "evaluation.every_steps=0")
    assert first["rewards/broken/errors"] == 0 and "reward" in first
    assert second["rewards/broken/errors"] == 1
    assert second["rewards/broken/timeouts"] == 0
    assert second["loss_denominator/rows"] == 1  # nothing to learn from: the floor of the denominator
    assert second["policy_tokens"] == 0
    assert "reward" not in second


def test_a_reward_that_hangs_is_left_behind_at_its_deadline(tmp_path):
    """A name of its own: the thread that hangs keeps its reward busy for as long as it lives."""
    overrides = ["rewards.hanging.deadline_s=0.5", "evaluation.every_steps=0"]
    for line in run_with("hangs", tmp_path / "run", *overrides, name="hanging"):
        assert line["rewards/hanging/timeouts"] == 1
        assert line["policy_tokens"] == 0


def test_nan_and_none_leave_their_completion_out_of_its_group(tmp_path):
    for line in run_with("not_numbers", tmp_path / "run", "rewards.answer.weight=0", "evaluation.every_steps=0"):
        assert line["rewards/broken/errors"] == pytest.approx(1 / 4)  # NaN is a failure, None is not
        assert line["loss_denominator/rows"] == 4 * 2
        assert line["reward"] == pytest.approx(0.5)
        assert line["policy_tokens"] == line["loss_denominator/tokens"]
