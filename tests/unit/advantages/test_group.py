import pytest
from advantage_groups import make_group
from hypothesis import given
from hypothesis import strategies as st

from rltrain.advantages.group import GroupConfig, as_rewards, group, group_advantages
from rltrain.batching.zero_variance import is_zero_variance
from rltrain.errors import ConfigError
from rltrain.types import Context, Group

REWARDS = st.lists(st.sampled_from([0.0, 1.0, 0.25, -3.0, None]), min_size=1, max_size=8)


def test_hand_computed():
    rewards = [1, 0, 0, 1, 1, 0]  # mean 1/2, sample variance 6·(1/4)/5 = 0.3
    std = 0.3**0.5
    grpo = [sign * 0.5 / (std + 1e-6) for sign in (1, -1, -1, 1, 1, -1)]
    assert group_advantages(rewards).tolist() == pytest.approx(grpo, abs=1e-12)
    assert group_advantages(rewards, scale="none").tolist() == [0.5, -0.5, -0.5, 0.5, 0.5, -0.5]
    rloo = [0.6, -0.6, -0.6, 0.6, 0.6, -0.6]  # 1 - 2/5 and 0 - 3/5
    assert group_advantages(rewards, baseline="leave_one_out", scale="none").tolist() == pytest.approx(rloo, abs=1e-15)


@given(REWARDS)
def test_leave_one_out_is_the_mean_of_the_others(rewards):
    counted = [reward for reward in rewards if reward is not None]
    expected = [
        0.0 if reward is None or len(counted) < 2 else reward - (sum(counted) - reward) / (len(counted) - 1)
        for reward in rewards
    ]
    found = group_advantages(rewards, baseline="leave_one_out", scale="none")
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


@given(REWARDS, st.floats(-10, 10))
def test_a_constant_added_to_all_rewards_changes_nothing(rewards, shift):
    shifted = [None if reward is None else reward + shift for reward in rewards]
    assert group_advantages(shifted).tolist() == pytest.approx(group_advantages(rewards).tolist(), abs=1e-6)


def test_abstaining_rewards_leave_the_statistics():
    with_abstainers = group_advantages([1.0, None, 0.0, float("nan"), 0.0])
    assert with_abstainers[[0, 2, 4]].tolist() == group_advantages([1.0, 0.0, 0.0]).tolist()
    assert with_abstainers[[1, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("rewards", [[0.1] * 7, [1.0], [None, None], [None, 0.3], [], [0.1, None, 0.1, 0.1]])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_no_difference_gives_exact_zeros(rewards, eps):
    assert is_zero_variance(as_rewards(rewards))
    assert group_advantages(rewards, eps=eps).tolist() == [0.0] * len(rewards)


def test_every_token_of_a_completion_gets_its_advantage():
    one = make_group([(5, 6, 7), (), (5,)], [1.0, 0.0, 0.0])
    values = group([one, one], GroupConfig(scale="none"), Context()).values
    assert [[row.tolist() for row in rows] for rows in values] == [[pytest.approx([2 / 3] * 3), [], [-1 / 3]]] * 2


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigError, match=r"advantage\.scale=var: unknown; set std or none"):
        GroupConfig(scale="var")
    with pytest.raises(ConfigError, match=r"advantage\.baseline=median: unknown"):
        group_advantages([1.0, 0.0], baseline="median")
    with pytest.raises(ConfigError, match=r"advantage\.eps=-1"):
        GroupConfig(eps=-1)
    unscored = make_group([(1,), (2,)], [1.0, 0.0])
    unscored = Group(prompt=unscored.prompt, completions=unscored.completions)
    with pytest.raises(ValueError, match="score it before asking for advantages"):
        group([unscored], GroupConfig(), Context())
