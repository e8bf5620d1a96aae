"""Signs of bad reasoning on texts and token ids worked out by hand."""

import pytest
from advantage_groups import make_group
from hypothesis import given
from hypothesis import strategies as st

from rltrain.advantages.failed_steps import failed_step_fraction, failed_steps
from rltrain.rewards.signs import repeat_share, sign_metrics, think_answer_mismatch


@pytest.mark.parametrize(("ids", "size", "share"), [
    (list(range(30)), 10, 0.0),
    ([*range(10), *range(10)], 10, 0.5),
    ([*range(12), 99, *range(12)], 10, 12 / 25),  # three 10-grams seen before, which cover 12 tokens
    ([7] * 12, 10, 11 / 12),  # the 10-gram from 1 on equals the one from 0 on
    ([1, 2, 3, 1, 2, 9, 1, 2], 2, 4 / 8),
    ([7] * 10, 10, 0.0), ([7] * 3, 10, 0.0), ([], 10, 0.0),
])  # fmt: skip
def test_repeated_tokens(ids, size, share):
    assert repeat_share(ids, size=size) == share


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 4))
def test_repeated_tokens_are_those_of_the_definition(ids, size):
    grams = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    again = [start for start, gram in enumerate(grams) if gram in grams[:start]]
    inside = {start + offset for start in again for offset in range(size)}
    assert repeat_share(ids, size=size) == (len(inside) / len(ids) if ids else 0.0)


@pytest.mark.parametrize(("text", "differs"), [
    ("17+16=33\n33-7=26\n\\boxed{26}", False),
    ("17+16=33\n33-7=26\n\\boxed{27}", True),
    ("<think>so x = -3</think> The answer is 5: \\boxed{-3}", False),  # 5 is no part of the thought
    ("it is 1,000.0 \\boxed{1000}", False),
    ("a half, \\frac{1}{2} \\boxed{0.5}", False),
    ("one of 3/4 \\boxed{\\frac{3}{4}}", False),
    ("9-7 \\boxed{7}", False),  # behind an operand the minus is an operator
    ("\\boxed{26}", None), ("no box 7", None), ("it is 4 \\boxed{x+1}", None), ("no number \\boxed{4}", None),
])  # fmt: skip
def test_a_thought_and_its_answer(text, differs):
    assert think_answer_mismatch(text) is differs


@pytest.mark.parametrize(("potentials", "failed"), [
    ([0.1, 0.5, 0.2, 0.3, 0.5, 0.6], "001100"),
    ([0.5, 0.2, 0.4, 0.1, 0.4, 0.6], "011110"),  # the inner branch lies in the outer
    ([0.5, 0.2, 0.4, 0.1, 0.4], "00010"),  # the outer is never reached again, the inner is
    ([0.9, 0.5, 0.1], "000"), ([0.1, 0.2, 0.3], "000"), ([0.3, 0.3, 0.1, 0.3], "0010"), ([], ""),
])  # fmt: skip
def test_failed_steps(potentials, failed):
    assert failed_steps(potentials) == [mark == "1" for mark in failed]
    assert failed_step_fraction(potentials) == failed.count("1") / max(1, len(failed))


def test_metrics_are_means_over_completions():
    group = make_group([[7] * 12, [1, 2, 3]], [1.0, 0.0])
    metrics = sign_metrics([group])
    assert metrics["completions/repeat_share"].total == 11 / 12
    assert metrics["completions/repeat_share"].count == 2
    assert metrics["completions/think_answer_mismatch"].count == 0
