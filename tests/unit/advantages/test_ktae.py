"""KTAE: Fisher's test against another library, its weights by hand, its conventions."""

import itertools
import math

import numpy as np
import pytest
from advantage_groups import make_group

from rltrain.advantages.group import group_advantages
from rltrain.advantages.key_tokens import fisher_exact, token_weights
from rltrain.advantages.ktae import KTAEConfig, end_ids, ktae, ktae_advantages
from rltrain.errors import RunError
from rltrain.policy.tiny import character_tokenizer
from rltrain.types import Context


def test_fisher_exact_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for table in itertools.product(range(4), repeat=4):
        if sum(table):
            a, b, c, d = table
            assert fisher_exact(*table) == pytest.approx(stats.fisher_exact([[a, b], [c, d]]).pvalue, rel=1e-10), table


def by_hand(completion_ids, right):
    found, weights = token_weights(completion_ids, right)
    return dict(zip(found.tolist(), weights.tolist(), strict=True))


def test_hand_computed():
    """Right [1] three times, wrong [1] and three times [2]. Token 1: a, b, c, d = 3, 1, 0, 3.

    Fisher: of C(7,3) = 35 tables 4 have a = 3, and one has a = 0 (the others 12 and 18), so p = 5/35.
    IG: H(3/7) - 4/7·H(3/4). h = asin 1 - asin 1/2 = pi/3. N = 3 and 4, avg = 3.5:
    tf_right = 1·3/(1 + 2(1/2 + 1/2·3/3.5)) = 3/(20/7) = 1.05, tf_wrong = (1/4·3)/(1/4 + 1 + 8/7).
    """

    def entropy(p):
        return -p * math.log2(p) - (1 - p) * math.log2(1 - p)

    information = entropy(3 / 7) - 4 / 7 * entropy(3 / 4)
    tf_wrong = 0.75 / (0.25 + 1 + 8 / 7)
    x = math.pi / 3 + 1.05 / (tf_wrong + 1e-5) - tf_wrong / (1.05 + 1e-5)
    expected = (math.exp(-2 / 7) + information) * x / 2
    ids, rewards = [[1], [1], [1], [1], [2], [2], [2]], [1, 1, 1, 0, 0, 0, 0]
    assert by_hand(ids, [bool(r) for r in rewards])[1] == pytest.approx(expected, rel=1e-12)
    shared = group_advantages(rewards).tolist()
    rows = ktae_advantages(ids, rewards)
    added = 2 * (1 / (1 + math.exp(-expected)) - 0.5)
    assert rows[0].tolist() == pytest.approx([shared[0] + added], rel=1e-12)
    assert rows[3].tolist() == pytest.approx([shared[3] + added], rel=1e-12)  # the same id in a wrong completion
    assert rows[4].tolist() == pytest.approx([shared[4] - 1], abs=1e-6)  # only wrong ones hold 2: sigmoid(-large)


def test_a_token_of_both_sides_by_hand():
    """Right [1, 2], [1, 1, 3], wrong [1, 2, 2], [3, 3]. Token 1: 2, 1, 0, 1, every table as likely: p = 1, F = 0."""
    information = 1 - 0.75 * (math.log2(3) - 2 / 3)
    tf_right, tf_wrong = (0.6 * 3) / (0.6 + 2), (0.2 * 3) / (0.2 + 2)
    x = math.pi / 4 + tf_right / (tf_wrong + 1e-5) - tf_wrong / (tf_right + 1e-5)
    weights = by_hand([[1, 2], [1, 1, 3], [1, 2, 2], [3, 3]], [True, True, False, False])
    assert weights[1] == pytest.approx(information * x / 2, rel=1e-12)
    assert weights[2] == 0.0  # held by one of two on both sides: F = 0 and IG = 0


def test_right_and_wrong_exchanged_turn_the_sign():
    ids = [[1, 2], [1, 1, 3], [1, 2, 2], [3, 3], [1]]
    right = [True, True, False, False, True]
    weights, turned = by_hand(ids, right), by_hand(ids, [not one for one in right])
    assert any(weights.values())
    for token, weight in weights.items():
        assert turned[token] == pytest.approx(-weight, rel=1e-9, abs=1e-12)


def test_ids_that_end_a_completion_weigh_nothing():
    tokenizer = character_tokenizer()
    eos, letter = tokenizer.eos_token_id, 20
    groups = [make_group([[30, eos], [31, letter]], [1.0, 0.0])]
    assert end_ids(groups, tokenizer) == {eos}  # the second stopped at a stop string
    (rows,) = ktae(groups, KTAEConfig(), Context(tokenizer=tokenizer)).values
    shared = group_advantages([1.0, 0.0]).tolist()
    assert rows[0].tolist() == pytest.approx([shared[0] + 1, shared[0]], abs=1e-6)
    assert rows[1].tolist() == pytest.approx([shared[1] - 1, shared[1] - 1], abs=1e-6)


def test_without_a_tokenizer_it_is_refused_in_one_line():
    """A stop string's last token would weigh 0 as EOS does."""
    with pytest.raises(RunError, match="advantage=ktae: the tokenizer is not at hand, and EOS cannot") as caught:
        ktae([make_group([[30, 1], [31, 20]], [1.0, 0.0])], KTAEConfig(), Context())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rewards", [[0.6, 0.9, 1.0], [0.0, 0.2, 0.5]])
def test_one_sided_groups_are_grpos(rewards):
    rows = ktae_advantages([[1, 2], [2], []], rewards)
    shared = group_advantages(rewards).tolist()
    assert [row_T.tolist() for row_T in rows] == [[shared[0]] * 2, [shared[1]], []]


def test_an_empty_side_has_no_terms():
    """The wrong completion holds no token: b = 0, tf_wrong = 0, N = 1 and 0."""
    found, weights = token_weights([[5], []], [True, False])
    assert found.tolist() == [5] and np.isfinite(weights).all() and weights[0] > 1000
    assert token_weights([[], []], [True, False])[0].tolist() == []


def test_the_metric_is_what_tokens_are_moved_by():
    group = make_group([[20], [21]], [1.0, 0.0])
    result = ktae([group], KTAEConfig(), Context(tokenizer=character_tokenizer()))
    assert result.metrics["ktae/shift"].count == 2
    expected = sum(
        abs(float(row_T[0]) - a) for row_T, a in zip(result.values[0], group_advantages([1, 0]), strict=True)
    )
    assert result.metrics["ktae/shift"].total == pytest.approx(expected)
