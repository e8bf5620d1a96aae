"""The grid over remaining length and reward, its marginals and its loss, against numbers worked out by hand."""

import dataclasses
import math

import pytest
import torch
from advantage_groups import make_group
from loss_batches import batch

from rltrain.errors import ConfigError, RunError
from rltrain.losses.introspection import Grid, Introspected, introspection_loss, kl_of_top, refuse_uncovered, top_tokens
from rltrain.runtime.introspection import IntrospectionConfig

GRID = Grid(lengths=(0, 4, 8), rewards=(0.0, 1.0))
# p(length bin, reward bin)
JOINT = torch.tensor([[0.1, 0.2], [0.3, 0.1], [0.1, 0.2]], dtype=torch.float64)


def observed(remaining, rewards, weights=None):
    tokens = batch([0.0] * len(remaining), weights=weights)
    lengths, values = torch.tensor(remaining), torch.tensor(rewards, dtype=torch.float64)
    return dataclasses.replace(tokens, remaining_N=lengths, rewards_N=values)


def test_an_observation_has_a_cell():
    # length bins 0-3, 4-7, 8 and more; the cell is 2·length bin + reward bin; 0.5 lies between and counts as 0
    remaining, rewards = torch.tensor([1, 3, 4, 7, 8, 100]), torch.tensor([0.0, 1.0, 0.5, 0.51, 1.0, 0.0])
    assert GRID.cells_of(remaining, rewards).tolist() == [0, 1, 2, 3, 5, 4]


def test_marginals_by_hand():
    grid_NC = JOINT.log().reshape(1, 6) + 3.0  # a shift of the logits changes nothing
    assert GRID.middles_B.tolist() == [1.5, 5.5, 11.5]  # 0..3, 4..7, 8..15
    assert GRID.values(grid_NC).item() == pytest.approx(0.2 + 0.1 + 0.2)
    # 0.3·1.5 + 0.4·5.5 + 0.3·11.5
    assert GRID.expected_lengths(grid_NC).item() == pytest.approx(0.45 + 2.2 + 3.45)
    torch.testing.assert_close(GRID.joint(grid_NC)[0], JOINT)


def test_the_loss_by_hand():
    config = IntrospectionConfig(head=True, lengths=[0, 4, 8], rewards=[0.0, 1.0], weight=2.0)
    grid_NC = JOINT.log().reshape(1, 6).repeat(3, 1)
    # cells (0-3, right), (8 and more, wrong); the third token carries no loss
    tokens = observed([2, 9, 1], [1.0, 0.0, 0.0], weights=[0.1, 0.7, 0.0])
    loss, metrics = introspection_loss(Introspected(grid_NC, None), tokens, config, tokens=4.0)
    assert loss.item() == pytest.approx(2.0 * -(math.log(0.2) + math.log(0.1)) / 4)
    assert metrics["introspection/squared_error"].total == pytest.approx(0.25 + 0.25)  # V = 0.5 at both
    assert metrics["introspection/bias"].total == pytest.approx(0.0)
    assert metrics["introspection/length_error_tokens"].total == pytest.approx(4.1 + 2.9)  # E L = 6.1
    assert metrics["introspection/cross_entropy"].count == 2


def test_the_kl_of_top_tokens_by_hand():
    frozen, policy = torch.tensor([[0.5, 0.3]]).double(), torch.tensor([[0.25, 0.25]]).double()
    # the other tokens are one entry, 0.2 and 0.5
    expected = 0.5 * math.log(2) + 0.3 * math.log(1.2) + 0.2 * math.log(0.4)
    assert kl_of_top(frozen.log(), policy.log()).item() == pytest.approx(expected)
    assert kl_of_top(frozen.log(), frozen.log()).item() == pytest.approx(0.0)


def test_the_kl_of_all_tokens_is_the_whole_one_and_has_no_gradient_where_both_agree():
    logits, other = torch.randn(2, 3, 7, dtype=torch.float64).unbind(0)
    ids, frozen = top_tokens(logits, 6).chunk(2, -1)
    policy = other.log_softmax(-1)
    whole = torch.nn.functional.kl_div(policy, logits.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_of_top(frozen, policy.gather(-1, ids.long())), whole)  # the seventh is the rest
    same = logits.clone().requires_grad_()
    kl_of_top(frozen, same.log_softmax(-1).gather(-1, ids.long())).sum().backward()
    torch.testing.assert_close(same.grad, torch.zeros_like(same), atol=1e-12, rtol=0)


def test_alone_adds_the_kl():
    config = IntrospectionConfig(head=True, lengths=[0, 4, 8], alone=True, kl_coef=10.0)
    frozen, policy = torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[0.25, 0.25]]).log()
    tokens = dataclasses.replace(observed([2], [1.0]), top_logprobs_NK=frozen)
    loss, _ = introspection_loss(Introspected(torch.zeros(1, 6), policy), tokens, config, tokens=2.0)
    kl = 0.5 * math.log(2) + 0.3 * math.log(1.2) + 0.2 * math.log(0.4)
    assert loss.item() == pytest.approx((math.log(6) + 10 * kl) / 2, rel=1e-6)


def test_a_reward_outside_the_bins_names_its_problem():
    config = IntrospectionConfig(head=True, rewards=[0.0, 1.0])
    refuse_uncovered([make_group([[1], [2]], [1.0, None])], config, 0)
    with pytest.raises(RunError, match=r"^step 3: problem p7 has a reward of 1.5, outside .*rewards=.*; widen them$"):
        refuse_uncovered([make_group([[1], [2]], [1.0, 1.5], name="p7")], config, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lengths": [1, 4]}, "must rise from 0"),
        ({"rewards": [1.0, 0.0]}, "must rise"),
        ({"head": False, "alone": True}, "no head to train"),
        ({"alone": True, "weight": 0.0}, "trains nothing"),
    ],
    ids=["lengths", "rewards", "no head", "no weight"],
)
def test_what_the_config_refuses(options, words):
    with pytest.raises(ConfigError, match=words):
        IntrospectionConfig(**{"head": True} | options)
