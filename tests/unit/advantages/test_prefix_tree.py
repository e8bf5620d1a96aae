import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rltrain.advantages.prefix_tree import common_prefixes, prefix_values

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "tempo.json").read_text())
REWARD = st.sampled_from([0.0, 1.0, 0.1, 0.725, -2.0, None, math.nan])
# Three ids and short rows make duplicates, prefixes of each other and empty completions common.
ROWS = st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=6), REWARD), min_size=1, max_size=9)


def dictionary_values(completion_ids, rewards):
    """The definition: every prefix keyed by itself, the mean of the rewards filed under it."""
    filed = {}
    for ids, reward in zip(completion_ids, rewards, strict=True):
        if reward is not None and not math.isnan(reward):
            for t in range(len(ids) + 1):
                filed.setdefault(tuple(ids[:t]), []).append(reward)
    return [
        [
            math.nan
            if reward is None or math.isnan(reward)
            else sum(filed[tuple(ids[:t])]) / len(filed[tuple(ids[:t])])
            for t in range(len(ids) + 1)
        ]
        for ids, reward in zip(completion_ids, rewards, strict=True)
    ]


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["name"])
def test_vectors(case):
    values = prefix_values(case["completion_ids"], case["rewards"])
    for found, expected in zip(values, case["prefix_values"], strict=True):
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(expected, abs=1e-9)


@given(ROWS)
def test_agrees_with_a_dictionary_of_prefixes(rows):
    completion_ids, rewards = [ids for ids, _ in rows], [reward for _, reward in rows]
    expected = dictionary_values(completion_ids, rewards)
    for found, reference in zip(prefix_values(completion_ids, rewards), expected, strict=True):
        assert found.tolist() == pytest.approx(reference, abs=1e-12, nan_ok=True)


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=9))
def test_common_prefixes_count_equal_leading_tokens(completion_ids):
    def shared(left, right):
        return next(
            (t for t, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
        )

    expected = [[shared(left, right) for right in completion_ids] for left in completion_ids]
    assert common_prefixes(completion_ids).tolist() == expected


def test_a_long_near_duplicate_splits_at_its_token():
    row = torch.randint(0, 150_000, (5000,))
    other = row.clone()
    other[4321] += 1
    first, second = prefix_values([row, other], [1.0, 0.0])
    assert first[:4322].unique().tolist() == second[:4322].unique().tolist() == [0.5]
    assert first[4322:].unique().tolist() == [1.0]
    assert second[4322:].unique().tolist() == [0.0]


def test_lists_tuples_and_tensors_are_one():
    rows = [[7, 2**32 - 1, 256], [7, 2**32 - 1], [7, 65536, 256, 1]]  # ids whose bytes alone would mislead
    expected = [values.tolist() for values in prefix_values(rows, [1.0, 0.0, 0.5])]
    assert expected == [[0.5, 0.5, 0.5, 1.0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5, 0.5]]
    for convert in (tuple, torch.tensor):
        found = prefix_values([convert(row) for row in rows], torch.tensor([1.0, 0.0, 0.5]))
        assert [values.tolist() for values in found] == expected


def test_where_completions_end_inside_one_another():
    values = prefix_values([[], [1], [1, 2], [1, 2]], [0.0, 1.0, 0.5, 1.0])
    assert [row.tolist() for row in values] == [
        [0.625],
        [0.625, pytest.approx(2.5 / 3)],
        [0.625, pytest.approx(2.5 / 3), 0.75],
        [0.625, pytest.approx(2.5 / 3), 0.75],
    ]


def test_nodes_of_equal_rewards_have_exactly_that_value():
    first, *_ = prefix_values([[1, 2], [1, 3], [1, 4], [5, 5]], [0.1, 0.1, 0.1, 0.3])
    assert first[1:].tolist() == [0.1, 0.1]  # (0.1 + 0.1 + 0.1) / 3 is not 0.1


def test_who_abstains_is_not_in_the_trie():
    rows, rewards = [[1, 2], [1, 2], [1, 3], [4]], [1.0, None, 0.0, math.nan]
    values = prefix_values(rows, rewards)
    assert values[0].tolist() == [0.5, 0.5, 1.0]
    assert values[2].tolist() == [0.5, 0.5, 0.0]
    assert values[1].isnan().tolist() == [True] * 3
    assert values[3].isnan().tolist() == [True] * 2
