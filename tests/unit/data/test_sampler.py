"""The order of problems against its definition: concatenated permutations, cut into steps."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltrain.data.sampler import Permutation, occurrences, problem_indices
from rltrain.errors import ConfigError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 257, 1000, 4097])
def test_permutation_hits_every_index_once(size):
    permutation = Permutation(size, 3, 7)
    assert sorted(permutation[i] for i in range(size)) == list(range(size))


def test_permutation_is_uniform_on_small_ranges():
    counts = Counter(tuple(Permutation(4, key)[i] for i in range(4)) for key in range(4800))
    # 24 orders, 200 expected of each; chi-square with 23 degrees of freedom is below 58.6 with probability 0.99994.
    assert sum((counts[order] - 200) ** 2 / 200 for order in counts) + 200 * (24 - len(counts)) < 58.6


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 17), st.integers(0, 5))
def test_every_problem_comes_once_per_epoch(size, count, seed):
    epochs = 3
    steps = -(-size * epochs // count)
    order = [index for step in range(steps) for index in problem_indices(size, count, seed=seed, step=step)]
    for epoch in range(epochs):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(1, 12), st.integers(0, 40), st.integers(1, 5))
def test_replacements_are_disjoint_from_earlier_attempts_while_problems_last(size, count, step, attempts):
    batches = [problem_indices(size, count, seed=1, step=step, attempt=a) for a in range(attempts + 1)]
    assert all(len(batch) == count and set(batch) <= set(range(size)) for batch in batches)
    distinct = set(batches[0])
    for a, batch in enumerate(batches[1:], start=1):
        if size >= (a + 1) * count:
            assert len(set(batch)) == count and not distinct & set(batch)
        distinct |= set(batch)


def test_order_depends_on_seed_and_epoch_and_not_on_the_steps_before():
    first = problem_indices(1000, 1000, seed=0, step=0)
    assert first == [i for step in range(10) for i in problem_indices(1000, 100, seed=0, step=step)]
    assert first != problem_indices(1000, 1000, seed=0, step=1)
    assert first != problem_indices(1000, 1000, seed=1, step=0)
    assert len(set(problem_indices(10**12, 64, seed=0, step=10**9))) == 64


def test_impossible_requests_say_so():
    with pytest.raises(ConfigError, match=r"empty"):
        problem_indices(0, 4, seed=0, step=0)
    with pytest.raises(ConfigError, match=r"count=0"):
        problem_indices(4, 0, seed=0, step=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 9), st.integers(0, 4))
def test_a_problem_and_its_occurrence_name_a_draw_of_a_step_once(size, count, step, attempts):
    draws = [
        (index, occurrence)
        for attempt in range(attempts + 1)
        for index, occurrence in zip(
            problem_indices(size, count, seed=2, step=step, attempt=attempt),
            occurrences(size, count, seed=2, step=step, attempt=attempt),
            strict=True,
        )
    ]
    times = Counter(index for index, _ in draws)
    assert sorted(draws) == [(index, each) for index in sorted(times) for each in range(times[index])]


def test_the_only_problem_of_a_data_set_occurs_again_and_again():
    assert occurrences(1, 4, seed=0, step=3) == [0, 1, 2, 3]
    assert occurrences(1, 4, seed=0, step=3, attempt=2) == [8, 9, 10, 11]
    assert occurrences(100, 4, seed=0, step=3) == [0, 0, 0, 0]
