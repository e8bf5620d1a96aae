"""RandomCalculation's rewards: the given vectors, the literal rule, hostile boxes."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rltrain.data.random_calculation import generate
from rltrain.errors import ConfigError
from rltrain.evaluate import group_metrics
from rltrain.rewards import scoring
from rltrain.rewards.random_calculation import (
    RandomCalculationRewardConfig,
    boxed_number,
    continuous_reward,
    parse_literal,
    random_calculation,
)
from rltrain.types import Completion, Context, Group, Mean, Problem, Prompt

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "random_calculation_reward.json").read_text())


def group(problem: Problem, *texts: str) -> Group:
    completions = tuple(Completion(token_ids=(), logprobs=(), finish="stop", text=text) for text in texts)
    return Group(prompt=Prompt(problem=problem, token_ids=()), completions=completions)


def score(problem: Problem, *texts: str, kind: str = "continuous"):
    config = RandomCalculationRewardConfig(kind=kind)
    return random_calculation([group(problem, *texts)], config, Context())


def integer(value: int) -> Problem:
    return Problem(id="p", prompt="", answer=str(value), meta={"exact": f"{value}/1"})


@pytest.mark.parametrize("vector", VECTORS)
def test_vectors(vector):
    answer, reference, reward = vector["answer"], vector["reference"], vector["reward"]
    assert continuous_reward(answer, reference) == pytest.approx(reward, rel=1e-12, abs=1e-15)
    assert continuous_reward(repr(answer), repr(reference)) == pytest.approx(reward, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    "answer", [None, math.nan, math.inf, -math.inf, "", "nan", "inf", "x", True, [1], "1 2", "2+2"]
)
def test_no_number_earns_nothing(answer):
    assert continuous_reward(answer, 1) == 0.0


@pytest.mark.parametrize("reference", [None, math.nan, math.inf, "x"])
def test_a_reference_that_is_no_number_is_an_error(reference):
    with pytest.raises(ValueError, match=r"reference"):
        continuous_reward(1.0, reference)


@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(allow_nan=False, allow_infinity=False))
def test_reward_lies_in_the_unit_interval_and_is_the_formula(answer, reference):
    reward = continuous_reward(answer, reference)
    assert 0.0 <= reward <= 1.0
    if math.isfinite(answer) and abs(answer) < 1e300 and abs(reference) < 1e300:
        gap = abs(answer - reference)
        formula = 1 - 0.5 * min(gap, 1) - 0.5 * min(gap / (abs(reference) + 1e-6), 1)
        assert reward == pytest.approx(formula, abs=1e-9)


def test_numbers_beyond_floats():
    assert continuous_reward(10**400, 3) == 0.0
    assert continuous_reward(10**400, 10**400) == 1.0
    assert continuous_reward(Fraction(1, 3), Fraction(1, 3)) == 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("14", Fraction(14)),
        (" -3.50 ", Fraction(-7, 2)),
        ("+.5", Fraction(1, 2)),
        ("14.", Fraction(14)),
        ("$7$", Fraction(7)),
        ("\u22122", Fraction(-2)),
        ("7.27e-6", Fraction(727, 10**8)),
        ("7.27E+2", Fraction(727)),
        (r"7.27 \times 10^{-6}", Fraction(727, 10**8)),
        (r"-2\times10^3", Fraction(-2000)),
        (r"2 \cdot 10^{3}", Fraction(2000)),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        (r"\frac{6}{8}", Fraction(3, 4)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
    ],
)
def test_literals(text, value):
    assert parse_literal(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "", "-", ".", "1.2.3", "1,000", "1 000", "3+4", "2*7", "(14)", "--3", "1e", "e5", "1e1.5", "0x10", "1_000",
        "3/0", r"\frac{1}{0}", "1/2/3", "3.5/2", r"\frac{\frac{1}{2}}{3}", r"\frac{1}{2} + 1", r"1\frac{1}{2}", "2^3",
        r"\sqrt{4}", r"14 \div 2", r"3 \times 4", r"3 \times 10^{2} + 1", "x=5", "５", "１４", "nan", "inf",
        "14 apples", "1e999999999", "9" * 513, "1e-401", r"2 \times 10^{999999999999}",
    ],
)  # fmt: skip
def test_everything_else_is_no_number(text):
    assert parse_literal(text) is None


def test_an_echo_of_the_question_earns_nothing():
    for steps in (1, 3):
        for problem in generate(steps, 60, seed=0, split="test"):
            assert score(problem, f"\\boxed{{{problem.meta['expression']}}}").scores == [[0.0]]
    for problem in generate(1, 60, seed=0, split="test", preset="integers"):
        assert score(problem, f"\\boxed{{{problem.meta['expression']}}}", kind="exact").scores == [[0.0]]
    assert score(integer(2), r"\boxed{8/4}", r"\boxed{2/1}", r"\boxed{2}", kind="exact").scores == [[0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("preset", "kind"), [("paper", "continuous"), ("integers", "exact"), ("integers", "continuous")]
)
def test_worked_solutions_earn_everything(preset, kind):
    for steps in (1, 4, 20):
        for problem in generate(steps, 60, seed=0, split="train", preset=preset):
            assert score(problem, problem.meta["solution"], kind=kind).scores == [[1.0]]


def test_the_last_box_counts_and_metrics_are_shares():
    scores = score(
        integer(10), r"\boxed{10} or \boxed{11}", r"so \boxed{10.5}", "ten", r"\boxed{ten}", r"\boxed{10", r"\boxed{10}"
    )
    assert scores.scores[0] == pytest.approx([0.450000005, 0.7250000025, 0, 0, 0, 1], abs=1e-9)
    assert scores.metrics == {"accuracy": Mean(total=1, count=6), "answered": Mean(total=3, count=6)}


def test_accuracy_has_a_relative_tolerance_and_exact_has_none():
    texts = (r"\boxed{1000.9}", r"\boxed{1001.1}", r"\boxed{1000.0}")
    assert score(integer(1000), *texts).metrics["accuracy"] == Mean(total=2, count=3)
    exact = score(integer(1000), *texts, kind="exact")
    assert exact.scores == [[0.0, 0.0, 1.0]]
    assert exact.metrics["accuracy"] == Mean(total=1, count=3)


def test_a_problem_without_a_numeric_reference_abstains():
    scores = score(Problem(id="p", prompt="", answer="blue"), r"\boxed{1}", "x")
    assert scores.scores == [[None, None]]
    assert scores.metrics["accuracy"].count == 0
    assert score(Problem(id="p", prompt="", answer="7.5e-1"), r"\boxed{3/4}").scores == [[1.0]]


@pytest.mark.parametrize(
    "box",
    ["9" * 10**6, "1e" + "9" * 8000, "9" * 500 + "e400", "{" * 8000, "}" * 8000, "\x00", "\ud800", r"\frac{" * 2000,
     "1e400", "-" * 5000, "1/" + "0" * 200, r"1\times10^{" + "1" * 300 + "}"],
)  # fmt: skip
def test_hostile_boxes_earn_nothing_and_do_not_raise(box):
    assert score(integer(7), f"\\boxed{{{box}}}").scores == [[0.0]]


def test_config_rules():
    with pytest.raises(ConfigError, match=r"reward.kind=near"):
        RandomCalculationRewardConfig(kind="near")
    with pytest.raises(ConfigError, match=r"reward.relative_tolerance"):
        RandomCalculationRewardConfig(relative_tolerance=-1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\boxed{1,234}", 1234), (r"\boxed{1{,}234}", 1234), (r"\boxed{-1,234,567.5}", Fraction(-2469135, 2)),
        (r"\boxed{1\,234}", 1234), (r"\boxed{1,\!234}", 1234), (r"\boxed{1,23}", None), (r"\boxed{12,3456}", None),
        (r"\boxed{1 234}", None), (r"<think>\boxed{3.5}", None),
        (r"<think>\boxed{3}</think>\boxed{3.5}", Fraction(7, 2)), (r"<think>\boxed{3}</think>", None),
        (r"\boxed{1}</think>\boxed{2}</think>", None), (r"\boxed{2}</think>\boxed{3}", 3),
    ],
)  # fmt: skip
def test_thousands_and_boxes_in_thinking(text, value):
    assert boxed_number(text) == value


def test_a_prompt_that_opens_thinking_is_known():
    problem = Problem(id="p", prompt="q <think>\n", answer="3.5")
    completions = tuple(
        Completion(token_ids=(1,), logprobs=(0.0,), finish="stop", text=text)
        for text in (r"\boxed{3.5}", r"</think>\boxed{3.5}")
    )
    group = Group(prompt=Prompt(problem=problem, token_ids=(1,)), completions=completions)
    assert random_calculation([group], RandomCalculationRewardConfig(), Context()).scores == [[0.0, 1.0]]


def test_accuracy_and_pass_at_k_count_the_same_answers():
    """Within the tolerance but not the reference itself: the score is below 1, and the answer is right."""
    problem = Problem(id="p", prompt="", answer="100")
    texts = [r"\boxed{100}", r"\boxed{100.5}", r"\boxed{50}", "nothing"]
    completions = tuple(Completion(token_ids=(1,), logprobs=(0.0,), finish="stop", text=text) for text in texts)
    group = Group(prompt=Prompt(problem=problem, token_ids=(0,)), completions=completions)
    config = RandomCalculationRewardConfig(kind="continuous", relative_tolerance=0.01)
    (scored,), metrics = scoring.score([group], {"answer": config}, Context())
    assert scored.right_G.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert float(scored.rewards_G[1]) < 1
    counted = group_metrics(scored, samples=4)
    assert counted["accuracy"].total == metrics["accuracy"].total == 2
    assert counted["pass@2"].total == pytest.approx(1 - 1 / 6)  # 1 - C(2,2)/C(4,2)
