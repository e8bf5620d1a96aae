import json
import math
from pathlib import Path

import pytest
from advantage_groups import make_group
from hypothesis import given
from hypothesis import strategies as st

from rltrain.advantages.group import group_advantages
from rltrain.advantages.prefix_tree import prefix_values
from rltrain.advantages.tempo import TempoConfig, tempo, tempo_advantages
from rltrain.errors import ConfigError
from rltrain.types import Context, Mean

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "tempo.json").read_text())
IDS = st.lists(st.integers(0, 2), max_size=6)
ROWS = st.lists(st.tuples(IDS, st.sampled_from([0.0, 1.0, 0.25, -2.0])), min_size=2, max_size=9)


def unzip(rows):
    return [ids for ids, _ in rows], [reward for _, reward in rows]


def differences(completion_ids, rewards):
    """The TD terms alone: without a scale, minus the group part."""
    unscaled = tempo_advantages(completion_ids, rewards, normalize_std=False)
    return [row - base for row, base in zip(unscaled, group_advantages(rewards, scale="none"), strict=True)]


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["name"])
@pytest.mark.parametrize("normalize_std", [True, False])
def test_vectors(case, normalize_std):
    found = tempo_advantages(case["completion_ids"], case["rewards"], normalize_std=normalize_std)
    expected = case["advantages" if normalize_std else "advantages_without_std"]
    for row, reference in zip(found, expected, strict=True):
        assert row.tolist() == pytest.approx(reference, abs=1e-6)


@given(ROWS)
def test_td_terms_sum_to_the_centred_reward_where_the_path_ends_alone(rows):
    completion_ids, rewards = unzip(rows)
    mean = sum(rewards) / len(rewards)
    for ids, reward, td in zip(completion_ids, rewards, differences(completion_ids, rewards), strict=True):
        through = [other for other in completion_ids if other[: len(ids)] == ids]
        if len(through) == 1:
            assert float(td.sum()) == pytest.approx(reward - mean, abs=1e-12)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=6, max_size=6), st.sampled_from([0.0, 1.0])), min_size=2)
)
def test_td_terms_sum_to_zero_over_the_completions_of_every_node(rows):
    completion_ids, rewards = unzip(rows)
    sums = {}
    for ids, td in zip(completion_ids, differences(completion_ids, rewards), strict=True):
        for t, term in enumerate(td.tolist()):
            sums[tuple(ids[:t])] = sums.get(tuple(ids[:t]), 0.0) + term
    assert list(sums.values()) == pytest.approx([0.0] * len(sums), abs=1e-12)


@given(ROWS)
def test_the_td_term_is_exactly_zero_where_the_node_does_not_split(rows):
    completion_ids, rewards = unzip(rows)
    for ids, values_T1 in zip(completion_ids, prefix_values(completion_ids, rewards), strict=True):
        for t in range(len(ids)):
            here = [other for other in completion_ids if other[:t] == ids[:t]]
            if all(other[: t + 1] == ids[: t + 1] for other in here):
                assert values_T1[t] == values_T1[t + 1]


@given(st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=2, max_size=8))
def test_if_all_first_tokens_differ_token_1_gets_twice_the_group_advantage(rewards):
    completion_ids = [[i, 7, 7] for i in range(len(rewards))]
    for row, base in zip(tempo_advantages(completion_ids, rewards), group_advantages(rewards).tolist(), strict=True):
        assert row.tolist() == pytest.approx([2 * base, base, base], abs=1e-12)


@given(ROWS, st.floats(-5, 5))
def test_a_constant_added_to_all_rewards_changes_nothing(rows, shift):
    completion_ids, rewards = unzip(rows)
    shifted = tempo_advantages(completion_ids, [reward + shift for reward in rewards])
    for row, moved in zip(tempo_advantages(completion_ids, rewards), shifted, strict=True):
        assert moved.tolist() == pytest.approx(row.tolist(), abs=1e-6)


@given(ROWS, st.randoms(use_true_random=False))
def test_permuting_the_group_permutes_the_rows(rows, random):
    order = random.sample(range(len(rows)), len(rows))
    found = tempo_advantages(*unzip(rows))
    permuted = tempo_advantages(*unzip([rows[i] for i in order]))
    for i, row in zip(order, permuted, strict=True):
        assert row.tolist() == pytest.approx(found[i].tolist(), abs=1e-9)


@given(ROWS)
def test_on_policy_the_gradient_is_that_of_two_baselines(rows):
    """Who shares a child shares its score function, so in the sum over them V(child) may be replaced by r_i."""
    completion_ids, rewards = unzip(rows)
    mean = sum(rewards) / len(rewards)
    values = prefix_values(completion_ids, rewards)
    advantages = tempo_advantages(completion_ids, rewards, normalize_std=False)
    found, expected = {}, {}
    for i, ids in enumerate(completion_ids):
        for t in range(len(ids)):
            key = tuple(ids[: t + 1])
            found[key] = found.get(key, 0.0) + float(advantages[i][t])
            expected[key] = expected.get(key, 0.0) + rewards[i] - mean + rewards[i] - float(values[i][t])
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("rewards", [[0.1, 0.1, 0.1], [None, 0.3, None], [math.nan] * 3])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_no_difference_gives_exact_zeros(rewards, eps):
    rows = tempo_advantages([[1, 2], [1, 3, 3], []], rewards, eps=eps)
    assert [row.tolist() for row in rows] == [[0.0] * 2, [0.0] * 3, []]


def test_who_abstains_gets_zero_and_changes_nobody():
    rows, rewards = [[1, 2], [1, 2, 5], [1, 3], [4]], [1.0, None, 0.0, 0.0]
    found = tempo_advantages(rows, rewards)
    without = tempo_advantages([rows[0], rows[2], rows[3]], [1.0, 0.0, 0.0])
    assert found[1].tolist() == [0.0] * 3
    assert [found[i].tolist() for i in (0, 2, 3)] == [row.tolist() for row in without]


def test_a_group_of_two():
    first, second = tempo_advantages([[1, 2, 3], [1, 4]], [1.0, 0.0])
    unit = 0.5 / (0.5**0.5 + 1e-6)
    assert first.tolist() == pytest.approx([unit, 2 * unit, unit], abs=1e-12)
    assert second.tolist() == pytest.approx([-unit, -2 * unit], abs=1e-12)


def test_the_plug_in_gives_the_function_and_three_shares():
    late = make_group([[1, 2, 3], [1, 4], [5], [5]], [1.0, 0.0, 0.0, 0.0])  # the duplicate [5] never is alone
    early = make_group([[1], [2, 2], [3, 3, 3]], [1.0, 0.0, None])  # who abstains does not count
    equal = make_group([[1, 1], [1]], [0.5, 0.5])
    result = tempo([late, early, equal], TempoConfig(normalize_std=False), Context())
    for group, rows in zip([late, early, equal], result.values, strict=True):
        expected = tempo_advantages(group.completion_ids, group.rewards_G, normalize_std=False)
        assert [row.tolist() for row in rows] == [row.tolist() for row in expected]
    # late: V = 1/4 -> 1/2 -> 1 and 0, 1/4 -> 0 -> 0: five tokens of seven move; early: 2 of 3; equal: 0 of 3.
    # Alone after 2, 2, and never (1, 1); 1, 1; 2 and never (1). Groups with a split after token 1: late and equal.
    assert dict(result.metrics) == {
        "tempo/nonzero_td_share": Mean(total=8, count=13),
        "tempo/alone_depth_tokens": Mean(total=11, count=8),
        "tempo/late_split_share": Mean(total=2, count=3),
    }


def test_negative_eps_is_refused():
    with pytest.raises(ConfigError, match=r"advantage\.eps=-1"):
        TempoConfig(eps=-1)
