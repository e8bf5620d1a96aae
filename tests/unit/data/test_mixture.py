"""A mixture: exact shares, every problem once per epoch of its source, a pure function of (seed, step)."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltrain import cli
from rltrain.data.mixture import BLOCK, Mixture, MixtureConfig, slots, source_metrics, with_source_errors
from rltrain.data.random_calculation import RandomCalculationConfig
from rltrain.errors import ConfigError
from rltrain.registry import part_of
from rltrain.runs.metrics import Accumulator
from rltrain.types import Completion, Group, Problem, Prompt

TWO = ["data=mixture", "+data@data.sources.a=small_integers", "+data@data.sources.b=random_calculation"]


def problems(name, count):
    return [Problem(id=f"{name}{index}", prompt="q", answer="1") for index in range(count)]


def mixed(sizes, weights):
    config = MixtureConfig(
        sources={name: RandomCalculationConfig() for name in sizes}, weights=dict(zip(sizes, weights, strict=True))
    )
    return Mixture({name: problems(name, size) for name, size in sizes.items()}, config)


@pytest.mark.parametrize(("weights", "counts"), [
    ([3.0, 1.0], (750, 250)),
    ([1.0, 1.0, 1.0], (334, 333, 333)),
    ([0.001, 0.999], (1, 999)),
    ([2.0, 4.0, 1.0], (286, 571, 143)),  # 285.71, 571.43, 142.86
])  # fmt: skip
def test_slots_are_the_largest_remainders(weights, counts):
    assert slots(weights, "abc"[: len(weights)]) == counts


def test_every_block_has_the_shares():
    order = mixed({"a": 4000, "b": 4000}, [3, 1])
    for block in range(3):
        places = order.draw(BLOCK, seed=5, step=block)
        assert Counter(source for source, _ in places) == {0: 750, 1: 250}
    assert order.draw(8, seed=5, step=1) != order.draw(8, seed=6, step=1)


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 13), st.integers(0, 3))
def test_a_source_gives_every_problem_once_per_epoch(first, second, count, seed):
    order = mixed({"a": first, "b": second}, [2, 1])
    drawn = [place for step in range(200 // count) for place in order.draw(count, seed=seed, step=step)]
    for source, size in ((0, first), (1, second)):
        its = [index for chosen, index in drawn if chosen == source]
        for start in range(0, len(its) - size + 1, size):
            assert sorted(its[start : start + size]) == list(range(size))


def test_the_size_of_a_step_does_not_change_the_order():
    order = mixed({"a": 30, "b": 7}, [1, 1])
    assert order.draw(60, seed=0, step=0) == [place for step in range(10) for place in order.draw(6, seed=0, step=step)]


def test_replacements_are_other_problems_of_the_same_sources():
    order = mixed({"a": 50, "b": 50}, [1, 1])
    batches = [order.draw(6, seed=1, step=4, attempt=attempt) for attempt in range(4)]
    assert all([source for source, _ in batch] == [source for source, _ in batches[0]] for batch in batches)
    assert len({place for batch in batches for place in batch}) == 24


def test_as_a_sequence_it_ends_where_a_source_would_begin_again():
    order = mixed({"a": 30, "b": 10}, [3, 1])
    ids = [problem.id for problem in order]
    assert len(set(ids)) == len(ids) == len(order)
    counts = Counter(name.partition("/")[0] for name in ids)
    assert counts["a"] == 30 or counts["b"] == 10
    assert [name for name in ids if name.startswith("a")] == [f"a/a{index}" for index in range(counts["a"])]
    assert order[0].meta["mixture_source"] == ids[0][0]


@pytest.mark.parametrize(("overrides", "message"), [
    (["data=mixture"], "data.sources: is empty; add data sets, +data@data.sources.NAME=CHOICE"),
    ([*TWO, "+data.weights={a: 1, b: 0}"], "data.weights.b=0.0: must be > 0 and finite; leave the source out"),
    ([*TWO, "+data.weights={a: 1, b: nan}"], "data.weights.b=nan: must be > 0 and finite"),
    ([*TWO, "+data.weights={a: 1}"], "data.weights.b: has no value; set one for each of a, b"),
    ([*TWO, "+data.weights={a: 1, c: 2}"], "data.weights.c: no source has this name; choose of a, b"),
    ([*TWO, "+data.weights={a: 1, b: 9999}"], "data.weights.a: below 1/1000 of the sum"),
    ([*TWO, "data.pass_rate=[0, 1]", "data.pass_rate_file=f"], "set data.sources.NAME.pass_rate and its file"),
    ([*TWO, "data.sources.a.pass_rate=[0, 1]"], "data.sources.a.pass_rate=[0.0, 1.0] with data.sources.a"),
    (["data=mixture", "+data@data.sources.a=mixture"], "data.sources"),
])  # fmt: skip
def test_bad_mixtures_are_refused_in_one_line(overrides, message):
    with pytest.raises(ConfigError) as error:
        cli.compose(overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_line_makes_a_mixture():
    config = cli.compose([*TWO, "+data.weights={a: 3, b: 1}", "data.sources.a.test_size=20"]).data
    test = part_of(config).function(config, "test")
    assert [len(source) for source in test.sources] == [20, 512]
    assert test.counts == (750, 250)


def judged(source, right):
    problem = Problem(id=f"{source}{right}", prompt="q", answer="1", meta={"mixture_source": source} if source else {})
    completions = tuple(Completion(token_ids=(1,), logprobs=(0.0,), finish="stop") for _ in right)
    return Group(
        prompt=Prompt(problem=problem, token_ids=(1,)),
        completions=completions,
        right_G=torch.tensor(right, dtype=torch.float64),
    )


def test_accuracy_by_source():
    """a: shares 1 and 1/2, mean of 4 completions 3/4, std 0.3536 over sqrt(2); b: one problem, one abstention."""
    accumulator = Accumulator()
    for group in (judged("a", [1.0, 1.0]), judged("a", [0.0, 1.0]), judged("b", [0.0, math.nan]), judged("", [1.0])):
        accumulator.add(source_metrics(group))
    assert with_source_errors(accumulator.reduce()) == pytest.approx({
        "accuracy/a": 0.75, "accuracy/a_se": 0.25, "accuracy/b": 0.0, "accuracy/b_se": 0.0,
        "problems/a": 2.0, "problems/b": 1.0,
    })  # fmt: skip
