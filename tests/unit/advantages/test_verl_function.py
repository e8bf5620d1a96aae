"""Advantage functions written for verl give the same numbers through rltrain as on verl's own padded batch."""

from collections import defaultdict

import pytest
import torch
from advantage_groups import make_group

from rltrain.advantages.check import EstimatorError
from rltrain.advantages.group import group_advantages
from rltrain.advantages.verl_function import VerlFunctionConfig, verl_batch, verl_function
from rltrain.errors import ConfigError
from rltrain.types import Context

NAME = __name__


def outcome(token_level_rewards, response_mask, index, epsilon=1e-6, norm_adv_by_std_in_grpo=True, config=None):
    """GRPO's outcome advantage in verl's calling convention, looped."""
    scores = token_level_rewards.sum(dim=-1)
    by_prompt = defaultdict(list)
    for row, prompt in enumerate(index):
        by_prompt[prompt].append(row)
    for rows in by_prompt.values():
        group = scores[rows].clone()
        scale = group.std() + epsilon if norm_adv_by_std_in_grpo else 1.0
        scores[rows] = (group - group.mean()) / scale
    advantages = scores.unsqueeze(-1) * response_mask
    return advantages, advantages


def reward_to_go(token_level_rewards, response_mask, index, *, gamma, **kwargs):
    returns = torch.zeros_like(token_level_rewards)
    running = torch.zeros(len(returns))
    for t in reversed(range(returns.shape[1])):
        running = token_level_rewards[:, t] + gamma * running
        returns[:, t] = running
    return returns, returns


def with_config(token_level_rewards, response_mask, index, config):
    scaled = token_level_rewards.sum(dim=-1, keepdim=True) * config["scale"] * response_mask
    return scaled, scaled


def needs_a_critic(token_level_rewards, response_mask, values):
    return values, values


def one_value_per_row(token_level_rewards, response_mask, index):
    return token_level_rewards.sum(dim=-1), None


def advantages_alone(token_level_rewards, response_mask, index):
    return token_level_rewards


def nothing(token_level_rewards, response_mask, index):
    pass


def lists(token_level_rewards, response_mask, index):
    return token_level_rewards.tolist(), None


def config_of(function, **options):
    return VerlFunctionConfig(import_path=f"{NAME}:{function.__name__}", options=options)


GROUPS = [
    make_group([(1, 2, 3), (4,), (5, 6)], [1.0, 0.0, 0.25]),
    make_group([(7, 8), (9, 9, 9, 9), ()], [0.5, -1.0, 1.0]),
]


def test_the_batch_is_verls():
    batch, places = verl_batch(GROUPS)
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert batch.response_mask_BT.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.token_level_rewards_BT.tolist() == [
        [0, 0, 1, 0],
        [0, 0, 0, 0],
        [0, 0.25, 0, 0],
        [0, 0.5, 0, 0],
        [0, 0, 0, -1],
    ]
    index = list(batch.index_B)
    assert index[0] == index[1] == index[2] != index[3] == index[4]


@pytest.mark.parametrize("by_std", [True, False])
def test_grpo_in_verls_convention_is_grpo(by_std):
    found = verl_function(GROUPS[:1], config_of(outcome, norm_adv_by_std_in_grpo=by_std), Context()).values[0]
    expected_G = group_advantages(GROUPS[0].rewards_G, scale="std" if by_std else "none")
    for values_T, expected, ids in zip(found, expected_G, GROUPS[0].completion_ids, strict=True):
        assert values_T.tolist() == pytest.approx([float(expected)] * len(ids), abs=1e-6)


def test_discounted_returns_land_on_their_tokens():
    values = verl_function(GROUPS, config_of(reward_to_go, gamma=0.5), Context()).values
    assert [values_T.tolist() for values_T in values[0]] == [[0.25, 0.5, 1.0], [0.0], [0.125, 0.25]]
    assert [values_T.tolist() for values_T in values[1]] == [[0.25, 0.5], [-0.125, -0.25, -0.5, -1.0], []]


def test_an_abstention_leaves_the_batch_and_gets_zero():
    group = make_group([(1, 2), (3,), (4,)], [1.0, float("nan"), 0.0])
    values = verl_function([group], config_of(outcome, norm_adv_by_std_in_grpo=False), Context()).values[0]
    assert [values_T.tolist() for values_T in values] == [[0.5, 0.5], [0.0], [-0.5]]
    nobody = make_group([(1, 2)], [None])
    assert [v.tolist() for v in verl_function([nobody], config_of(outcome), Context()).values[0]] == [[0.0, 0.0]]


def test_a_required_config_gets_the_options():
    values = verl_function(GROUPS[:1], config_of(with_config, scale=4.0), Context()).values[0]
    assert values[2].tolist() == [1.0, 1.0]


def test_what_cannot_be_given_is_refused_when_the_config_is_made():
    with pytest.raises(ConfigError, match=r"needs \['values'\]"):
        config_of(needs_a_critic)
    with pytest.raises(ConfigError, match=r"options=\['gamma'\].*takes no such argument"):
        config_of(outcome, gamma=0.9)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (one_value_per_row, r"returned advantages of shape \(5,\), expected \(5, 4\); give one value per token"),
        (advantages_alone, r"returned Tensor, expected verl's pair \(advantages, returns\)"),
        (nothing, r"returned NoneType, expected verl's pair"),
        (lists, r"returned advantages of shape list, expected \(5, 4\)"),
    ],
)
def test_another_form_is_named(function, message):
    with pytest.raises(EstimatorError, match=f"^advantage.import_path={NAME}:{function.__name__}: {message}"):
        verl_function(GROUPS, config_of(function), Context())
