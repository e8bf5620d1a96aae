"""What the others through a prefix got: the leave-one-out tree, and the scale that TEMPO gives shared prefixes."""

import numpy as np
import pytest
import torch
from advantage_groups import make_group
from enumerated_gradients import expected_gradient, table
from hypothesis import given
from hypothesis import strategies as st

from rltrain.advantages.group import GroupConfig, as_rewards, group, group_advantages
from rltrain.advantages.leave_one_out_tree import (
    LeaveOneOutTreeConfig,
    leave_one_out_tree,
    leave_one_out_tree_advantages,
)
from rltrain.advantages.prefix_tree import common_prefixes, leave_one_out_values
from rltrain.errors import ConfigError
from rltrain.types import Context

IDS = st.lists(st.integers(0, 2), max_size=6)
ROWS = st.lists(st.tuples(IDS, st.sampled_from([0.0, 1.0, 0.25, None])), min_size=2, max_size=8)
LOO = {"baseline": "leave_one_out", "scale": "none"}


def slow_values(ids, rewards, i, kappa):
    """T of completion i as the formula says it, prefix by prefix."""
    others = [j for j in range(len(ids)) if j != i and rewards[j] is not None]
    value, before = sum(rewards[j] for j in others) / len(others), len(others)
    row = []
    for t in range(len(ids[i])):
        through = [j for j in others if len(ids[j]) >= t and list(ids[j][:t]) == list(ids[i][:t])]
        if len(through) < before:
            value = (sum(rewards[j] for j in through) + kappa * value) / (len(through) + kappa)
        before = len(through)
        row.append(value)
    return row


@given(ROWS, st.sampled_from([0.5, 1.0, 3.0]))
def test_values_are_those_of_the_formula(rows, kappa):
    ids, rewards = [row for row, _ in rows], [reward for _, reward in rows]
    found = leave_one_out_values(common_prefixes(ids), as_rewards(rewards), kappa=kappa)
    counted = [i for i, reward in enumerate(rewards) if reward is not None]
    for i, row_T in enumerate(found):
        assert len(row_T) == len(ids[i])
        if i in counted and len(counted) > 1:
            assert row_T.tolist() == pytest.approx(slow_values(ids, rewards, i, kappa), abs=1e-12)
        else:
            assert row_T.isnan().all()


def test_hand_computed():
    """[1,2,3] 1, [1,2,4] 0, [1,5] 1, [6] 0. The first: R = 1/3; through [1]: (0 + 1 + 1/3)/3 = 4/9; [1,2]: (0 + 4/9)/2.

    The third: R = 1/3, through [1]: (1 + 0 + 1/3)/3 = 4/9. The last: R = 2/3.
    """
    rows = leave_one_out_tree_advantages([[1, 2, 3], [1, 2, 4], [1, 5], [6]], [1.0, 0.0, 1.0, 0.0])
    assert rows[0].tolist() == pytest.approx([2 / 3, 5 / 9, 7 / 9], abs=1e-12)
    assert rows[2].tolist() == pytest.approx([2 / 3, 5 / 9], abs=1e-12)
    assert rows[3].tolist() == pytest.approx([-2 / 3], abs=1e-12)


def test_completions_that_part_at_once_have_rloos_advantage_at_first():
    """At the root T = R; alone, T stays what it was."""
    rewards = [1.0, 0.0, 0.25]
    rows = leave_one_out_tree_advantages([[1, 7], [2, 7], [3]], rewards)
    for row_T, expected in zip(rows, group_advantages(rewards, **LOO).tolist(), strict=True):
        assert row_T.tolist() == pytest.approx([expected] * len(row_T), abs=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_it_is_unbiased_by_enumeration(size):
    policy = table()
    config = LeaveOneOutTreeConfig()
    found = expected_gradient(policy, lambda g: leave_one_out_tree(g, config, Context()).values, size)
    np.testing.assert_allclose(found, policy.true_gradient, atol=1e-12)


def test_the_scale_divides_by_the_groups_std_and_equal_rewards_are_zero():
    ids, rewards = [[1, 2], [1, 3], [4]], [1.0, 0.0, 0.0]
    plain, scaled = (leave_one_out_tree_advantages(ids, rewards, scale=scale, eps=0.0) for scale in ("none", "std"))
    for row_T, other_T in zip(plain, scaled, strict=True):
        torch.testing.assert_close(row_T / (1 / 3) ** 0.5, other_T)
    for equal in ([0.1] * 3, [None, 0.3, None], [None] * 3):
        assert [row_T.tolist() for row_T in leave_one_out_tree_advantages(ids, equal)] == [[0.0] * 2, [0.0] * 2, [0.0]]


def test_who_abstains_is_not_in_the_tree():
    rows = leave_one_out_tree_advantages([[1, 2], [1, 2, 5], [1, 3], [4]], [1.0, None, 0.0, 0.0])
    without = leave_one_out_tree_advantages([[1, 2], [1, 3], [4]], [1.0, 0.0, 0.0])
    assert rows[1].tolist() == [0.0] * 3
    assert [rows[i].tolist() for i in (0, 2, 3)] == [row_T.tolist() for row_T in without]


# --- prefix scale ------------------------------------------------------------------------------------------------


def test_the_prefix_scale_by_hand():
    """n = 3 at the root, then 2 behind [1]: (2n-1)/n = 5/3 and 3/2. RLOO: 1, -1/2, -1/2."""
    config = GroupConfig(**LOO, prefix_scale=True)
    (rows,) = group([make_group([[1, 2], [1, 3], [4]], [1.0, 0.0, 0.0])], config, Context()).values
    assert rows[0].tolist() == pytest.approx([5 / 3, 3 / 2], abs=1e-12)
    assert rows[1].tolist() == pytest.approx([-5 / 6, -3 / 4], abs=1e-12)
    assert rows[2].tolist() == pytest.approx([-5 / 6], abs=1e-12)


def test_the_prefix_scale_with_abstentions_and_equal_rewards():
    config = GroupConfig(**LOO, prefix_scale=True)
    abstains = make_group([[1, 2], [1, 3], [1, 4]], [1.0, None, 0.0])
    equal = make_group([[1, 2], [1]], [0.3, 0.3])
    first, second = group([abstains, equal], config, Context()).values
    assert [row_T.tolist() for row_T in first] == [[1.5, 1.5], [0.0, 0.0], [-1.5, -1.5]]
    assert [row_T.tolist() for row_T in second] == [[0.0, 0.0], [0.0]]


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigError, match="prefix_scale=true with advantage.baseline=mean: undefined; set advantage.b"):
        GroupConfig(prefix_scale=True)
    with pytest.raises(ConfigError, match=r"advantage\.kappa=0: must be > 0"):
        LeaveOneOutTreeConfig(kappa=0)
