"""Data whose deciding tokens are known: the stated distributions, and splits that share no problem."""

import re

import pytest

from rltrain.data.digit_chains import DigitChains, DigitChainsConfig, probability_right, running_sums, split_of
from rltrain.data.forks import Forks, ForksConfig, expected, pairs_of
from rltrain.data.random_calculation import SPLITS
from rltrain.errors import ConfigError
from rltrain.rewards.named_method import is_right


def test_no_pair_of_digits_is_in_two_splits_in_either_order():
    """15 unordered pairs of 0..4: 9, 3 and 3 of them; together all 25 ordered ones."""
    splits = {split: set(pairs_of(split, 4)) for split in SPLITS}
    assert [len({tuple(sorted(pair)) for pair in splits[split]}) for split in SPLITS] == [9, 3, 3]
    assert sum(map(len, splits.values())) == len(set.union(*splits.values())) == 25
    for pairs in splits.values():
        assert {(b, a) for a, b in pairs} == pairs
    prompts = {split: {one.prompt for one in Forks(ForksConfig(), split)[:200]} for split in SPLITS}
    assert not prompts["train"] & prompts["test"] and not prompts["train"] & prompts["validation"]


@pytest.mark.parametrize(("visits", "right"), [(1, 1.0), (2, 2.0), (4, 3.7), (6, 4.8), (7, 5.2), (11, 6.8)])
def test_the_right_method_is_named_ever_less_over_the_ramp(visits, right):
    """Two visits at 1, then 4 that fall to 0.4: the means 0.925, 0.775, 0.625, 0.475 of their ends, then 0.4 each."""
    assert expected(visits, 0.4, 2, 4) == pytest.approx(right)


def test_a_ramp_names_the_right_method_in_its_share():
    """Of 100 visits to a pair 20 are at 1, 40 in the fall with mean 0.7, 40 at 0.4: 20 + 28 + 16 = 64."""
    pairs = len(pairs_of("train", 4))
    items = Forks(ForksConfig(all_right=20 * pairs, ramp=40 * pairs), "train")[: 100 * pairs]
    right = [one.meta["solution"][0] == one.meta["method"] for one in items]
    assert all(right[: 20 * pairs]) and abs(sum(right) / pairs - 64) < 0.5
    assert sum(right[60 * pairs :]) / pairs == pytest.approx(16, abs=0.5)
    likely = [one.meta["solution"][1] == "a" for one in items[20 * pairs : 60 * pairs]]
    assert abs(sum(likely) / len(likely) - 0.85) < 0.05  # from 1 to 0.7


@pytest.mark.parametrize("decision", ["first", "last"])
def test_forks_have_the_stated_distribution(decision):
    config = ForksConfig(decision=decision)
    items = Forks(config, "train")[: 1000 * len(pairs_of("train", 4))]
    places = {"first": slice(0, 1), "last": slice(15, 16)}[decision]
    named = [one.meta["solution"][places] for one in items]
    right = [name == one.meta["method"] for name, one in zip(named, items, strict=True)]
    assert sum(right) == 0.4 * len(items)  # 1000 visits to a pair hold exactly 400
    wrong = {one.id: (ord(name) - ord(one.meta["method"])) % 3 for name, one in zip(named, items, strict=True)}
    assert abs(list(wrong.values()).count(1) / len(items) - 0.3) < 0.001
    wording = [one.meta["solution"].replace(name, "", 1)[:14] for name, one in zip(named, items, strict=True)]
    likely = [text[0] == "a" for text in wording]  # the first place has a, b, c
    assert abs(sum(likely) / len(items) - 0.7) < 0.02
    assert {text[0] for text in wording} == {"a", "b", "c"}
    assert all(re.fullmatch(r"([a-z]{4}\n){2}[a-z]{4}", text) for text in wording)


def test_the_first_forks_name_the_right_method_in_likely_letters():
    one = Forks(ForksConfig(all_right=1), "train")[0]
    assert one.meta["solution"] == f"{one.meta['method']}adgj\nmpsv\nybeh\n\\boxed{{{one.answer}}}"


def test_a_right_completion_names_the_right_method_and_boxes_its_number():
    problem = Forks(ForksConfig(), "train")[0]
    right, number = problem.meta["method"], problem.answer
    other = "ABC"[("ABC".index(right) + 1) % 3]
    scores = [is_right(text, problem) for text in (
        f"{right}adgj\n\\boxed{{{number}}}", f"adgj\n{right}\\boxed{{{number}}}", f"{other}adgj\n\\boxed{{{number}}}",
        f"{right}adgj\n\\boxed{{{int(number) % 3 + 1}}}", f"{right}adgj\n",
    )]  # fmt: skip
    assert scores == [1, 1, 0, 0, 0]


def test_chains_of_digits_and_their_slips():
    """3+4+1 modulo 5: 2, 3; a slip of 1 in the first line: 3, 4."""
    assert running_sums([3, 4, 1], [0, 0], 5) == [2, 3]
    assert running_sums([3, 4, 1], [1, 0], 5) == [3, 4]
    clean = DigitChains(DigitChainsConfig(slip=0.0, base=10, steps=2), "train")
    for problem in clean[:50]:
        digits = [int(word) for word in str(problem.prompt).split("+")]
        first, last = (digits[0] + digits[1]) % 10, sum(digits) % 10
        assert problem.meta["solution"] == f"{first}\n{last}\n\\boxed{{{last}}}" and problem.answer == str(last)


def test_traces_are_right_as_often_as_the_walk_of_their_error_says():
    """Base 3, slip 0.15, one line: 0.85. Two lines: both without a slip, or slips that cancel: 0.7225 + 0.15²/2."""
    assert probability_right(0.15, 1, 3) == pytest.approx(0.85)
    assert probability_right(0.15, 2, 3) == pytest.approx(0.7225 + 0.15**2 / 2)
    problems = DigitChains(DigitChainsConfig(), "train")[:4000]
    right = sum(one.meta["solution"].endswith(f"{{{one.answer}}}") for one in problems) / len(problems)
    assert abs(right - probability_right(0.15, 5, 3)) < 0.024  # three standard errors


def test_no_chain_is_in_two_splits_and_tails_repeat_the_last_line():
    config = DigitChainsConfig(tail=2, slip=0.0, steps=1)
    prompts = {split: {str(one.prompt) for one in DigitChains(config, split)[:300]} for split in SPLITS}
    assert not prompts["train"] & prompts["test"] and not prompts["train"] & prompts["validation"]
    for split, texts in prompts.items():
        assert {split_of([int(word) for word in text.split("+")]) for text in texts} == {split}
    tails = [one.meta["solution"].count("\n") - 1 for one in DigitChains(config, "train")[:600]]
    assert set(tails) == {0, 1, 2} and abs(tails.count(1) / 600 - 1 / 3) < 0.06


def test_the_first_chains_have_more_zeros_and_slips_come_over_a_ramp():
    """A digit is 0 by 0.5 + 0.5/3 = 2/3; then slips by 0.3·(0, 1/2, 1)."""
    config = DigitChainsConfig(all_right=1000, zeros=0.5, ramp=2000, slip=0.3)
    problems = DigitChains(config, "train")[:4000]
    digits = [word for one in problems[:1000] for word in str(one.prompt).split("+")]
    assert abs(sum(int(word) == 0 for word in digits) / len(digits) - 2 / 3) < 0.06
    first = [one.meta["solution"][0] == str(sum(map(int, str(one.prompt).split("+")[:2])) % 3) for one in problems]
    assert all(first[:1000])
    for part, rate in ((first[1000:2000], 0.075), (first[2000:3000], 0.225), (first[3000:], 0.3)):
        assert abs(part.count(False) / 1000 - rate) < 0.045  # three standard errors


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ForksConfig(decision="middle"), "data.decision=middle"),
    (lambda: ForksConfig(right=1.5), "data.right=1.5: must lie in"),
    (lambda: ForksConfig(prompt="{a}\n"), "add {a} and {b}"),
    (lambda: DigitChainsConfig(base=11), "data.base=11: must lie in 2..10"),
    (lambda: DigitChainsConfig(slip=-1), "data.slip=-1: must lie in"),
    (lambda: DigitChainsConfig(zeros=1), "data.zeros=1: must lie in [0, 1)"),
    (lambda: ForksConfig(ramp=-1), "data.ramp=-1: must be >= 0"),
], ids=["decision", "right", "prompt", "base", "slip", "zeros", "ramp"])  # fmt: skip
def test_settings_that_cannot_be_are_named(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()
