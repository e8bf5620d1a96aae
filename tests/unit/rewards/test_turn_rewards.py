"""The sum of the turns' rewards, as a part of the reward of a completion."""

import pytest
from turned_groups import alone, group_of, spoken

from rltrain.errors import ConfigError
from rltrain.rewards.scoring import score
from rltrain.rewards.turn_rewards import TurnRewardsConfig, turn_rewards
from rltrain.types import Context

TALKS = [
    spoken([5, 6], [100], [7], [101], [8], rewards=[0.25, -1.0, 0.5]),
    spoken([5], [100], rewards=[2.0]),
]


def test_it_is_the_sum_over_the_turns_and_enters_the_reward_by_its_weight():
    group = group_of(TALKS, [0.0, 0.0])
    assert turn_rewards([group], TurnRewardsConfig(), Context()).scores == [[-0.25, 2.0]]
    (scored,), metrics = score([group], {"turns": TurnRewardsConfig(weight=2.0)}, Context())
    assert scored.rewards_G is not None and scored.rewards_G.tolist() == [-0.5, 4.0]
    assert scored.reward_parts["turns"].tolist() == [-0.25, 2.0]
    assert metrics["rewards/turns/mean"].total == 1.75


def test_a_completion_without_turns_is_refused_in_one_line():
    with pytest.raises(ConfigError) as caught:
        turn_rewards([group_of([TALKS[0], alone(TALKS[1])], [0.0, 0.0], name="q7")], TurnRewardsConfig(), Context())
    assert str(caught.value) == (
        "rewards: a completion of problem q7 has no turns, whose rewards could be summed; choose an environment, or "
        "remove the reward turn_rewards"
    )
