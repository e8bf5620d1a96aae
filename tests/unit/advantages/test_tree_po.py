import pytest
import torch
from advantage_groups import make_group
from hypothesis import given
from hypothesis import strategies as st

from rltrain.advantages.group import group_advantages
from rltrain.advantages.tree_po import TreePOConfig, tree_po, tree_po_advantages
from rltrain.errors import ConfigError
from rltrain.types import Context

IDS = [[1, 1, 2, 3], [1, 1, 2, 4], [1, 1, 5], [6]]
REWARDS = [1.0, 0.0, 1.0, 0.0]


def test_by_hand():
    """Subgroups: all four (V 1/2), the first three after two tokens each (2/3), the first two after a third (1/2)."""
    by_node = [(1 / 2 + 1 / 3 + 1 / 2) / 3, (-1 / 2 - 2 / 3 - 1 / 2) / 3, (1 / 2 + 1 / 3) / 2, -1 / 2]
    assert tree_po_advantages(IDS, REWARDS).tolist() == pytest.approx(by_node)
    by_token = [(1 / 2 + 2 / 3 + 1 / 2) / 4, (-1 / 2 - 4 / 3 - 1 / 2) / 4, (1 / 2 + 2 / 3) / 3, -1 / 2]
    assert tree_po_advantages(IDS, REWARDS, depths="tokens").tolist() == pytest.approx(by_token)


def test_without_shared_tokens_it_is_the_group_advantage():
    found = tree_po_advantages([[1, 2], [3], [4, 4]], [1.0, 0.5, 0.0])
    assert torch.equal(found, group_advantages([1.0, 0.5, 0.0], scale="none"))


def test_completions_of_one_token_and_duplicates():
    """Two equal completions are a subgroup of their own: the mean of r - 1/3 and r - 1/2."""
    found = tree_po_advantages([[1], [1], [2]], [1.0, 0.0, 0.0])
    assert found.tolist() == pytest.approx([(2 / 3 + 1 / 2) / 2, (-1 / 3 - 1 / 2) / 2, -1 / 3])


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2), max_size=5), st.sampled_from([0.0, 1.0, 0.25])), min_size=2, max_size=8
    ),
    st.sampled_from(["nodes", "tokens"]),
)
def test_it_equals_a_slow_reference_and_ignores_a_shift(rows, depths):
    ids, rewards = [tuple(one) for one, _ in rows], [reward for _, reward in rows]
    for i, own in enumerate(ids):
        gaps, before = [], None
        for depth in range(len(own) + 1):
            group = [j for j, other in enumerate(ids) if other[:depth] == own[:depth]]
            if len(group) > 1 and (depths == "tokens" or group != before):
                gaps.append(rewards[i] - sum(rewards[j] for j in group) / len(group))
            before = group
        assert float(tree_po_advantages(ids, rewards, depths=depths)[i]) == pytest.approx(sum(gaps) / len(gaps))
    shifted = tree_po_advantages(ids, [reward + 3 for reward in rewards], depths=depths)
    assert shifted.tolist() == pytest.approx(tree_po_advantages(ids, rewards, depths=depths).tolist(), abs=1e-12)


def test_the_estimator_whitens_what_teaches():
    """Equal rewards and abstentions are zeros and in no statistic; the rest has mean 0 and variance 1."""
    groups = [make_group(IDS, REWARDS), make_group([[1, 2], [1]], [1, 1]), make_group([[7], [8], [9, 9]], [1, None, 0])]
    values = tree_po(groups, TreePOConfig(), Context()).values
    assert [row.tolist() for row in values[1]] == [[0, 0], [0]]
    assert values[2][1].tolist() == [0]
    flat = torch.cat([*values[0], values[2][0], values[2][2]])
    assert (float(flat.mean()), float(flat.var(correction=0))) == pytest.approx((0, 1), abs=1e-6)
    plain = tree_po(groups, TreePOConfig(whiten=False), Context())
    assert plain.values[0][3].tolist() == [-0.5]
    shared = plain.metrics["tree/leaves_per_token"]
    # 3 3 2 1, 3 3 2 1, 3 3 1, 1 of the first group; 2 1, 2 of the second; 1 1 1 1 of the third.
    assert (shared.total, shared.count) == (9 + 9 + 7 + 1 + 3 + 2 + 4, 4 + 4 + 3 + 1 + 2 + 1 + 4)


def test_nothing_to_compare_is_zero():
    assert tree_po_advantages([[1], [2]], [None, 1.0]).tolist() == [0, 0]
    assert tree_po_advantages([[1], [1, 2]], [None, None]).tolist() == [0, 0]


def test_a_wrong_setting_is_named():
    with pytest.raises(ConfigError, match="advantage.depths=steps: unknown; set one of nodes, tokens"):
        TreePOConfig(depths="steps")
