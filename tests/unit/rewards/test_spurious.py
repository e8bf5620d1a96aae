"""Spurious controls against their definitions."""

from __future__ import annotations

import pytest

from rltrain.errors import ConfigError
from rltrain.rewards.random_calculation import RandomCalculationRewardConfig, random_calculation
from rltrain.rewards.spurious import (
    InvertedRewardConfig,
    MajorityWrongRewardConfig,
    RandomRewardConfig,
    inverted_reward,
    majority_wrong_reward,
    random_reward,
)
from rltrain.types import Completion, Context, Group, Mean, Problem, Prompt

BASE = "random_calculation"
EXACT = {"kind": "exact"}


def group(*boxes: str, answer: str = "7", problem_id: str = "p") -> Group:
    completions = tuple(
        Completion(token_ids=(), logprobs=(), finish="stop", text=f"\\boxed{{{box}}}" if box else "") for box in boxes
    )
    return Group(
        prompt=Prompt(problem=Problem(id=problem_id, prompt="", answer=answer), token_ids=()), completions=completions
    )


def test_random_is_a_fair_coin_of_seed_step_problem_and_sample():
    groups = [group(*["1"] * 50, problem_id=str(n)) for n in range(80)]

    def flips(seed: int, step: int, groups=groups, p: float = 0.5) -> list[float]:
        scores = random_reward(groups, RandomRewardConfig(probability=p), Context(seed=seed, step=step)).scores
        return [score for scores_G in scores for score in scores_G]

    one = flips(0, 0)
    # 4000 fair flips: 5 standard deviations are 158; two independent sequences agree in half their places.
    assert abs(sum(one) - 2000) < 158
    assert abs(sum(flips(0, 0, p=0.1)) - 400) < 95
    assert sum(flips(0, 0, p=0.0)) == 0 and sum(flips(0, 0, p=1.0)) == 4000
    for other in (flips(1, 0), flips(0, 1), one[1:] + one[:1], one[50:] + one[:50]):
        assert abs(sum(a == b for a, b in zip(one, other, strict=True)) - 2000) < 158
    assert one == flips(0, 0)
    assert flips(0, 0, groups=groups[::-1])[:50] == one[-50:]


def test_inverted_is_one_minus_the_right_reward():
    groups = [group("7", "7.5", ""), group("1", "2", answer="blue")]
    right = random_calculation(groups, RandomCalculationRewardConfig(), Context())
    inverted = inverted_reward(groups, InvertedRewardConfig(base=BASE), Context())
    assert [r + i for r, i in zip(right.scores[0], inverted.scores[0], strict=True)] == pytest.approx([1, 1, 1])
    assert inverted.scores[0][0] == 0.0 and inverted.scores[0][2] == 1.0
    assert inverted.scores[1] == [None, None]
    assert inverted.metrics["accuracy"] == Mean(total=1, count=3)
    exact = inverted_reward(groups[:1], InvertedRewardConfig(base=BASE, options=EXACT), Context())
    assert exact.scores == [[0.0, 1.0, 1.0]]


def test_majority_wrong_rewards_the_wrong_majority_and_abstains_elsewhere():
    groups = [
        group("5", "5.0", "7", "", "10/2"),  # 5 by value three times, and wrong
        group("7", "7", "5"),  # right majority
        group("", ""),  # no answer
        group("4", "7"),  # a tie: the first sampled
        group("7", "4"),
        group("x+1", "x+1", "7"),  # a wrong majority need not be a number
        group("5", "5", answer="blue"),  # nothing to be wrong about
    ]
    scores = majority_wrong_reward(groups, MajorityWrongRewardConfig(base=BASE, options=EXACT), Context())
    assert scores.scores == [
        [1.0, 1.0, 0.0, 0.0, 1.0],
        [None, None, None],
        [None, None],
        [1.0, 0.0],
        [None, None],
        [1.0, 1.0, 0.0],
        [None, None],
    ]
    assert scores.metrics["majority_wrong"] == Mean(total=3, count=7)


def test_majority_wrong_with_a_continuous_base_needs_a_threshold():
    near = [group("7.0001", "7.0001", "3")]
    assert majority_wrong_reward(near, MajorityWrongRewardConfig(base=BASE), Context()).scores == [[1.0, 1.0, 0.0]]
    lenient = MajorityWrongRewardConfig(base=BASE, right_at=0.99)
    assert majority_wrong_reward(near, lenient, Context()).scores == [[None] * 3]


@pytest.mark.parametrize("config", [InvertedRewardConfig, MajorityWrongRewardConfig])
def test_config_rules(config):
    with pytest.raises(ConfigError, match=r"reward.base=nothing: .*random_calculation"):
        config(base="nothing")
    with pytest.raises(ConfigError, match=r"reward.base=inverted"):
        config(base="inverted")
    with pytest.raises(ConfigError, match=r"reward.options.sort: .* kind"):
        config(base=BASE, options={"sort": "exact"})
    with pytest.raises(ConfigError, match=r"reward.kind=near"):
        config(base=BASE, options={"kind": "near"})
    with pytest.raises(ConfigError, match=r"reward.probability=2"):
        RandomRewardConfig(probability=2)
