"""ConMax's reward: the worked vector, the floor rule, and the group statistics on top."""

import json
import math
from pathlib import Path

import pytest
import torch

from rltrain.advantages.group import group_advantages
from rltrain.rewards.compression import compression_reward

CASES = json.loads((Path(__file__).parents[2] / "vectors" / "conmax.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_rewards_and_advantages_of_the_vectors(case):
    answers = [[math.log(p) for p in row] for row in case["answer_token_probs"]]
    rewards = compression_reward(answers, case["mean_trace_logprob"], beta=case["beta"])
    torch.testing.assert_close(rewards, torch.tensor(case["rewards"], dtype=torch.float64))
    torch.testing.assert_close(group_advantages(rewards), torch.tensor(case["advantages"], dtype=torch.float64))


def test_each_score_is_a_mean_over_its_own_tokens():
    rewards = compression_reward([[-1.0, -3.0], [-2.0]], [[-0.5, -1.5, -1.0], [-4.0, 0.0]], beta=2.0)
    assert rewards.tolist() == [-2.0 + 2.0 * -1.0, -2.0 + 2.0 * -2.0]


def test_outputs_without_a_trace_get_the_floor():
    rewards = compression_reward([[-1.0], [], [-2.0], []], [[-1.0], [], [-0.5], []], beta=1.0)
    assert rewards.tolist() == [-2.0, -3.5, -2.5, -3.5]


def test_a_group_without_any_trace_is_constant_and_teaches_nothing():
    rewards = compression_reward([[], []], [[], []])
    assert rewards.tolist() == [-10.0, -10.0]
    assert group_advantages(rewards).tolist() == [0.0, 0.0]


def test_no_gradient_reaches_the_scorer():
    scores = torch.tensor([-1.0, -2.0], requires_grad=True)
    assert not compression_reward([scores], [scores]).requires_grad
