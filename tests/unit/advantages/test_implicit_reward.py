import pytest
import torch
from advantage_groups import make_group
from table_scorer import TableScorer
from tiny_run import config

from rltrain.advantages.group import group_advantages
from rltrain.advantages.implicit_reward import ImplicitRewardConfig, implicit_reward, implicit_reward_returns
from rltrain.errors import ConfigError
from rltrain.types import Context

REWARDS = [torch.tensor([0.2, 0.4]), torch.tensor([-0.1]), torch.tensor([0.0, 0.3, 0.3])]


def context_of(per_id=0.2):
    """Log-probs -0.1 and -0.3 times the id, so that q is 0.05·0.2 times it."""
    return Context(scorer=TableScorer({"phi": lambda _, i: (per_id - 0.3) * i, "reference": lambda _, i: -0.3 * i}))


def test_by_hand():
    """Mean token rewards 0.3, -0.1, 0.2; the others' means 0.05, 0.25, 0.1; outcomes 1/2, -1, 1/2."""
    found = implicit_reward_returns(REWARDS, [1.0, 0.0, 1.0])
    expected = [[0.15 + 0.35 + 0.5, 0.35 + 0.5], [-0.35 - 1], [-0.1 + 0.2 + 0.2 + 0.5, 0.4 + 0.5, 0.2 + 0.5]]
    assert [row.tolist() for row in found] == [pytest.approx(row, abs=1e-7) for row in expected]


def test_an_abstention_is_no_other():
    """Others of the first: the second alone, mean -0.1, reward 0."""
    found = implicit_reward_returns(REWARDS, [1.0, 0.0, None])
    assert found[0].tolist() == pytest.approx([0.3 + 0.5 + 1, 0.5 + 1])
    assert found[1].tolist() == pytest.approx([-0.4 - 1])
    assert found[2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("rewards", [[None, 1.0], [None, None]])
def test_alone_it_is_zero(rewards):
    assert torch.equal(torch.cat(implicit_reward_returns(REWARDS[:2], rewards)), torch.zeros(3).double())


def test_without_token_rewards_it_is_leave_one_out():
    found = implicit_reward_returns([torch.zeros(2), torch.zeros(1), torch.zeros(3)], [1.0, 0.0, 0.25])
    outcomes = group_advantages([1.0, 0.0, 0.25], baseline="leave_one_out", scale="none")
    assert [row.tolist() for row in found] == [[float(one)] * n for one, n in zip(outcomes, (2, 1, 3), strict=True)]


def test_the_first_token_has_the_whole_difference():
    """Summed over its tokens, q less the others' mean, as in PRIME's code. A shift of all q changes nothing."""
    for i, row in enumerate(implicit_reward_returns(REWARDS, [1.0, 1.0, 1.0])):
        others = [float(q.mean()) for j, q in enumerate(REWARDS) if j != i]
        own = REWARDS[i].double()
        k = len(REWARDS)
        released = own * k / (k - 1) - (sum(others) + float(own.mean())) / (k - 1)
        assert float(row[0]) == pytest.approx(float(released.sum()), abs=1e-6)
    shifted = implicit_reward_returns([q + 0.7 for q in REWARDS], [1.0, 0.0, 1.0])
    for left, right in zip(shifted, implicit_reward_returns(REWARDS, [1.0, 0.0, 1.0]), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def test_the_estimator_scores_and_whitens():
    """q = 0.01·id. The second group's rewards are equal, and it still takes part; the third has one that counts."""
    groups = [make_group([[1, 2], [3]], [1, 0]), make_group([[4], [6]], [1, 1]), make_group([[7], [8]], [1, None])]
    plain = implicit_reward(groups, ImplicitRewardConfig(whiten=False), context_of())
    expected = [[0.01 + 0.02 - 0.06 + 1, 0.02 - 0.03 + 1], [0.03 - 0.015 - 1], [-0.02], [0.02], [0], [0]]
    flat = [row for group in plain.values for row in group]
    assert [row.tolist() for row in flat] == [pytest.approx(row, abs=1e-6) for row in expected]
    assert plain.notes[0]["token_reward"] == [pytest.approx([0.01, 0.02]), pytest.approx([0.03])]
    total = plain.metrics["implicit_reward/completion_mean"]
    assert (total.total, total.count) == (pytest.approx(0.03 + 0.03 + 0.04 + 0.06), 4)

    whitened = implicit_reward(groups, ImplicitRewardConfig(), context_of()).values
    kept = torch.cat([*whitened[0], *whitened[1]])
    before = torch.cat(flat[:4])
    torch.testing.assert_close(kept, (before - before.mean()) / before.std(correction=0))
    assert torch.cat(list(whitened[2])).tolist() == [0, 0]


@pytest.mark.parametrize("overrides", [
    ["scorer.kind=frozen"],
    ["scorer.kind=frozen", "scorer.path=a", "reference=a"],
    ["scorer.kind=frozen", "model.path=a"],
    ["scorer.kind=frozen", "scorer.path=a", "model.path=a"],
], ids=str)  # fmt: skip
def test_one_model_for_both_is_refused(overrides, tmp_path):
    with pytest.raises(ConfigError, match="phi and the reference are one model"):
        config(tmp_path, "algorithm=implicit_reward", *overrides)


@pytest.mark.parametrize("overrides", [
    ["scorer.kind=ema"],
    ["scorer.kind=frozen", "scorer.path=better"],
    ["scorer.kind=frozen", "scorer.path=a", "model.path=a", "cold_start.steps=3"],
    ["scorer.kind=frozen", "reference=other"],
], ids=str)  # fmt: skip
def test_two_models_are_not(overrides, tmp_path):
    assert config(tmp_path, "algorithm=implicit_reward", *overrides).advantage.beta == 0.05
