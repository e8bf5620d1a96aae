"""Adaptive sampling by predicted rewards and lengths, against numbers worked out by hand."""

import math

import pytest
import torch

from rltrain.errors import RunError
from rltrain.rollout.adaptive import (
    Predicted,
    Prefixes,
    Problems,
    draw,
    expected_max,
    mean_and_error,
    measure,
    prefixes,
    price_of,
    vote,
)

REWARDS = (0.0, 1.0)


def completion(values, *, right=1.0, text="1"):
    """V before each token, and as many expected tokens as are left."""
    left = [float(len(values) - t) for t in range(len(values))]
    return Predicted(chances=[(1 - v, v) for v in values], left=left, right=right, text=text)


def test_the_expected_best_of_independent_rewards():
    assert expected_max([(0.5, 0.5), (0.4, 0.6)], REWARDS) == pytest.approx(1 - 0.5 * 0.4)
    # distribution functions (0.2, 0.5, 1) and (0.5, 0.75, 1), whose products are 0.1, 0.375, 1
    found = expected_max([(0.2, 0.3, 0.5), (0.5, 0.25, 0.25)], (0.0, 0.5, 1.0))
    assert found == pytest.approx(0.5 * 0.275 + 1.0 * 0.625)


def test_the_grid_becomes_marginals():
    joint_TBR = torch.tensor([[[0.1, 0.2], [0.3, 0.4]]], dtype=torch.float64)
    found = Predicted.of(joint_TBR, torch.tensor([1.5, 5.5], dtype=torch.float64), right=1.0, text="")
    assert found.chances[0] == pytest.approx([0.4, 0.6])
    assert found.left == pytest.approx([0.3 * 1.5 + 0.7 * 5.5])


@pytest.mark.parametrize(("price", "finished", "tokens"), [(0.01, [0, 1], 8), (0.02, [0], 4)])
def test_another_completion_is_begun_while_it_is_worth_its_tokens(price, finished, tokens):
    """After the first, of value 0.9, a start of value 0.5 adds 0.1·0.5 = 0.05 for 4 tokens; after two 0.01·0.5."""
    some = [completion([0.5, 0.6, 0.8, 0.9]) for _ in range(3)]
    found = draw(some, REWARDS, price=price, stretch=2)
    assert (found.finished, found.tokens) == (finished, tokens)
    assert found.values == pytest.approx([0.9] * len(finished))


def test_a_completion_that_goes_wrong_is_left():
    """After two tokens the first is worth 0.1 - 0.02, a new one 0.5 - 0.04. Once that is finished, nothing pays."""
    some = [completion([0.5, 0.4, 0.1, 0.1]), completion([0.5, 0.8, 0.9, 0.99])]
    found = draw(some, REWARDS, price=0.01, stretch=2)
    assert (found.finished, found.tokens) == ([1], 6)


def test_a_problem_has_an_answer_at_any_price():
    found = draw([completion([0.1, 0.1, 0.1])] * 2, REWARDS, price=10.0, stretch=8)
    assert (found.finished, found.tokens) == ([0], 3)


def test_the_price_meets_the_budget():
    assert price_of(lambda price: 0.1 / price, 10.0) == pytest.approx(0.01, rel=2e-3)
    with pytest.raises(RunError, match=r"budgets=2: even at a price of 1 a problem takes 3\.0; raise it"):
        price_of(lambda price: 3.0, 2.0)


def test_votes_by_weight():
    assert vote(["a", "b", "b"], [1.0, 0.0, 0.0], [0.9, 0.3, 0.4]) == 1.0
    assert vote(["a", "b", None], [1.0, 0.0, 1.0], [0.5, 0.5, 9.0]) == 0.5
    assert vote([None], [1.0], [1.0]) == 0.0


def test_votes_are_compared_at_equal_tokens():
    """Between one completion and two, by chance, so that 15 tokens are met between 10 and 20."""
    costs = Prefixes(tokens=[10.0, 20.0], accuracy=[[1.0, 0.0], [1.0, 1.0]])
    assert costs.at(15.0) == [1.0, 0.5]
    assert costs.at(20.0) == [1.0, 1.0]
    with pytest.raises(RunError, match=r"samples=2: voting over all takes 20\.0 tokens, fewer than the 21\.0"):
        costs.at(21.0)


def test_the_measurement_by_hand():
    """The head knows which completion is right; the vote does not."""
    known = [completion([0.5, 0.0], right=0.0, text="1"), completion([0.5, 1.0], right=1.0, text="2")]
    problems = Problems(completions=[known, known[::-1]], rewards=REWARDS, answer=lambda text: text, stretch=1)
    assert prefixes(problems.completions, lambda some: some[0].right).tokens == [2.0, 4.0]
    (found,) = measure(problems, problems, [3.5])
    # the wrong one is left after a token or finished, the right one ends the search
    assert found["accuracy"] == 1.0
    assert found["tokens"] <= 3.5
    assert found["majority"] == pytest.approx(0.5)
    assert found["gain_over_majority"] == pytest.approx(0.5)


def test_the_standard_error_by_hand():
    # mean 0.75, squares 0.75² + 3·0.25² = 0.75, over 3, over 4
    assert mean_and_error([1.0, 1.0, 1.0, 0.0]) == pytest.approx((0.75, math.sqrt(0.75 / 3 / 4)))
