"""RLP's reward and advantage: the worked vector, its loss, and what must cancel."""

import json
import math
from pathlib import Path

import pytest
import torch

from rltrain.advantages.group import group_advantages
from rltrain.batching.collate import collate
from rltrain.loss import policy_loss
from rltrain.losses.surrogate import SurrogateConfig
from rltrain.rewards.information_gain import information_gain
from rltrain.types import Completion, Group, Problem, Prompt

CASES = json.loads((Path(__file__).parents[2] / "vectors" / "rlp.json").read_text())


def scored(case) -> tuple[list[float], float]:
    return [math.log(p) for p in case["target_prob_with_thought"]], math.log(case["baseline_prob"])


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_rewards_and_advantages_of_the_vectors(case):
    rewards, advantages = information_gain(*scored(case))
    torch.testing.assert_close(rewards, torch.tensor(case["rewards"], dtype=torch.float64))
    torch.testing.assert_close(advantages, torch.tensor(case["advantages"], dtype=torch.float64))


def thought_batch(case, old_logprob: float = -1.0):
    """One group whose thoughts have the vector's lengths and advantages, packed as in training."""
    thoughts = [
        Completion(token_ids=(7,) * len(r), logprobs=(old_logprob,) * len(r), finish="stop") for r in case["ratios"]
    ]
    prompt = Prompt(problem=Problem(id="x", prompt="", answer=""), token_ids=(5, 6))
    group = Group(prompt=prompt, completions=tuple(thoughts))
    _, advantages_G = information_gain(*scored(case))
    values = [[a.expand(len(r)) for a, r in zip(advantages_G, case["ratios"], strict=True)]]
    (batch,), _ = collate([group], values, aggregation="sequence", token_budget=64, max_new_tokens=8)
    return batch


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_loss_of_the_vectors(case):
    batch = thought_batch(case)
    by_length = sorted(case["ratios"], key=lambda one: -len(one))  # packing puts the longest first
    ratios_N = torch.tensor([ratio for one in by_length for ratio in one])
    loss = policy_loss(batch.old_logprobs_N + ratios_N.log(), batch, SurrogateConfig(clip_low=0.2, clip_high=0.2)).loss
    assert float(loss) == pytest.approx(case["loss_clip_0.2"], abs=1e-6)


def test_gradient_at_ratio_one_is_the_advantage_over_length_and_samples():
    case = CASES[0]
    batch = thought_batch(case)
    logprobs_N = batch.old_logprobs_N.clone().requires_grad_()
    policy_loss(logprobs_N, batch, SurrogateConfig()).loss.backward()
    lengths_N = torch.bincount(batch.sequence_N)[batch.sequence_N]
    torch.testing.assert_close(logprobs_N.grad, -batch.advantages_N / (lengths_N * len(case["ratios"])))


def test_a_shift_of_the_baseline_changes_rewards_by_it_and_advantages_not_at_all():
    thoughts, baseline = scored(CASES[0])
    rewards, advantages = information_gain(thoughts, baseline)
    for shift in (-30.0, 0.5, 1000.0):
        shifted_rewards, shifted_advantages = information_gain(thoughts, baseline + shift)
        torch.testing.assert_close(shifted_rewards, rewards - shift)
        torch.testing.assert_close(shifted_advantages, advantages, rtol=1e-9, atol=1e-12)


def test_the_advantage_is_the_reward_minus_the_mean_of_the_others():
    rewards, advantages = information_gain([-0.5, -2.0, -0.1, -7.0, -1.0], -1.5)
    for i in range(5):
        others = torch.cat([rewards[:i], rewards[i + 1 :]])
        assert float(advantages[i]) == pytest.approx(float(rewards[i] - others.mean()))


def test_equal_scores_give_exact_zeros():
    assert information_gain([-1.3] * 4, -0.7)[1].tolist() == [0.0] * 4


def test_the_configured_estimator_gives_the_same_advantages():
    rewards, advantages = information_gain(*scored(CASES[0]))
    assert torch.equal(group_advantages(rewards, baseline="leave_one_out", scale="none"), advantages)
