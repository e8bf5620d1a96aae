"""A user's reward that fails is a counted failure in a real run: never its end, never a silent zero or broadcast."""

import pytest
from tiny_run import config, metrics

from rltrain import trainer


def run_with(function: str, run_dir, *overrides: str, name: str = "broken") -> list[dict]:
    broken = [f"+reward@rewards.{name}=custom", f"rewards.{name}.import_path=user_rewards:{function}"]
    trainer.fit(config(run_dir, *broken, "steps=2", *overrides))
    return metrics(run_dir)[1:]


@pytest.mark.parametrize("function", ["raises", "one_short", "leaves"])
def test_a_reward_that_fails_takes_its_completions_out_and_the_run_goes_on(function, tmp_path):
    for line in run_with(function, tmp_path / "run"):
        assert line["rewards/broken/errors"] == 1
        assert line["rewards/broken/timeouts"] == 0
        assert line["loss_denominator/rows"] == 1  # nothing to learn from: the floor of the denominator
        assert line["policy_tokens"] == 0
        assert "reward" not in line


def test_a_reward_that_hangs_is_left_behind_at_its_deadline(tmp_path):
    """A name of its own: the thread that hangs keeps its reward busy for as long as it lives."""
    overrides = ["rewards.slow.deadline_s=0.5", "evaluation.every_steps=0"]
    for line in run_with("hangs", tmp_path / "run", *overrides, name="slow"):
        assert line["rewards/slow/timeouts"] == 1
        assert line["policy_tokens"] == 0


def test_nan_and_none_leave_their_completion_out_of_its_group(tmp_path):
    for line in run_with("not_numbers", tmp_path / "run", "rewards.answer.weight=0"):
        assert line["rewards/broken/errors"] == pytest.approx(1 / 4)  # NaN is a failure, None is not
        assert line["loss_denominator/rows"] == 4 * 2
        assert line["reward"] == pytest.approx(0.5)
        assert line["policy_tokens"] == line["loss_denominator/tokens"]
