import math

import pytest
import torch
from advantage_groups import make_group
from hypothesis import given
from hypothesis import strategies as st

from rltrain.advantages.tree_rl import TreeRLConfig, tree_rl, tree_rl_advantages
from rltrain.types import Context

IDS = [[1, 2, 3], [1, 2, 4], [1, 5], [6]]
REWARDS = [1.0, 0.0, 1.0, 0.0]


def test_by_hand():
    """Leaves l = 2/3, -2/3, 2/3, -2/3. V: root 0, after [1] 2/9, after [1, 2] 0.

    R, token by token: 4/9 -2/9 4/3 | 4/9 -2/9 -4/3 | 4/9 10/9 | -4/3; their mean over nine tokens is 2/27.
    """
    expected = [
        [10 / 27 / math.sqrt(3), -8 / 27 / math.sqrt(2), 34 / 27],
        [10 / 27 / math.sqrt(3), -8 / 27 / math.sqrt(2), -38 / 27],
        [10 / 27 / math.sqrt(3), 28 / 27],
        [-38 / 27],
    ]
    found = tree_rl_advantages(IDS, REWARDS)
    assert [row.tolist() for row in found] == [pytest.approx(row) for row in expected]
    undivided = tree_rl_advantages(IDS, REWARDS, divide_by_leaves=False)
    assert undivided[0].tolist() == pytest.approx([10 / 27, -8 / 27, 34 / 27])


def test_without_shared_tokens_a_leaf_counts_twice():
    """Parent and root are one, so R = 2·l, less its token mean: l = 1, -1 on two tokens and one."""
    found = tree_rl_advantages([[1, 2], [3]], [1.0, 0.0])
    assert [row.tolist() for row in found] == [pytest.approx([2 - 2 / 3] * 2), pytest.approx([-2 - 2 / 3])]


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.sampled_from([0.0, 1.0, 0.25])),
        min_size=2,
        max_size=8,
    )
)
def test_weighted_by_the_root_of_its_leaves_it_sums_to_zero(rows):
    ids, rewards = [tuple(one) for one, _ in rows], [reward for _, reward in rows]
    total = 0.0
    for own, row_T in zip(ids, tree_rl_advantages(ids, rewards), strict=True):
        for depth, value in enumerate(row_T.tolist(), start=1):
            total += value * math.sqrt(sum(other[:depth] == own[:depth] for other in ids))
    assert total == pytest.approx(0, abs=1e-9)


def test_abstentions_are_no_leaves():
    alone = tree_rl_advantages([[1, 2], [1, 3], [4]], [1.0, 0.0, 0.5])
    beside = tree_rl_advantages([[1, 2], [1, 9], [1, 3], [4]], [1.0, None, 0.0, 0.5])
    assert torch.equal(torch.cat(alone), torch.cat([beside[0], *beside[2:]]))
    assert beside[1].tolist() == [0, 0]


@pytest.mark.parametrize("rewards", [[1.0, 1.0], [None, 0.0], [None, None]])
def test_nothing_to_compare_is_zero(rewards):
    values = tree_rl([make_group([[1, 2], [1]], rewards)], TreeRLConfig(), Context()).values
    assert [row.tolist() for row in values[0]] == [[0, 0], [0]]
