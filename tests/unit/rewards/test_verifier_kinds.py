"""Every kind of notation that real golds use: right forms, wrong neighbours, and golds that grade themselves."""

import json
import re
from pathlib import Path

import pytest
import verifier_kinds

from rltrain.rewards.math import grade, verify
from rltrain.rewards.verifier.evaluate import constant_ratio, same_expression
from rltrain.rewards.verifier.expression import parse_expression
from rltrain.rewards.verifier.extract import gold_of
from rltrain.rewards.verifier.number import parse_number
from rltrain.rewards.verifier.unit import canonical_unit, parse_quantity

CASES = json.loads((Path(__file__).parents[2] / "vectors" / "verifier_real_golds.json").read_text())
NEIGHBOURS = json.loads((Path(__file__).parents[2] / "vectors" / "verifier_neighbours.json").read_text())
PAGE = Path(__file__).parents[3] / "docs" / "rewards.md"
KINDS = verifier_kinds.KINDS


def box(content):
    return rf"So the answer is $\boxed{{{content}}}$."


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["kind"].split(":")[0].replace(" ", "-"))
def test_cases_of_public_sets(case):
    verdict = grade(case["output"], case["gold"], extraction=case.get("extraction", "boxed"))
    assert verdict.score == case["expected"], verdict


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    verdicts = [(gold, content, score, verify(box(content), gold)) for gold, content, score in KINDS[kind]]
    assert [row for row in verdicts if row[3].score != row[2]] == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "placeholders"])
def test_kinds_have_five_neighbours_right_and_wrong_and_golds_grade_themselves(kind):
    scores = [score for _, _, score in KINDS[kind]]
    assert min(scores.count(1), scores.count(0)) >= 5, kind
    golds = {gold for gold, _, _ in KINDS[kind]}
    assert [gold for gold in golds if verify(box(gold_of(gold)), gold).score != 1.0] == []


def test_neighbours_of_golds_of_every_kind():
    verdicts = [(gold, answer, score, verify(box(answer), gold)) for gold, answer, score in NEIGHBOURS]
    assert [row for row in verdicts if row[3].score != row[2]] == []


def test_a_gold_that_cannot_be_read_abstains_whatever_the_answer():
    for gold in (r"\max(a,b)", r"\mathbf{a}\times\mathbf{b}", r"1,2,\ldots,n", r"8 \text{ ft} \times 6 \text{ ft}"):
        for answer in (gold, "5", "x", r"\text{no}"):
            assert verify(box(answer), gold).status == "gold_error", (gold, answer)


def policy_rows():
    """The rows of the page's table of the policy: kind, gold, right answers, wrong answers."""
    section = PAGE.read_text().split("### What is right, and why", 1)[1].split("\n### ", 1)[0]
    for line in section.splitlines():
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 5 and cells[1].startswith("`"):
            yield cells[0], *(re.findall(r"`([^`]+)`", cell) for cell in cells[1:4])


def test_examples_of_the_policy_page():
    rows = list(policy_rows())
    assert len(rows) >= 40
    wrong = []
    for kind, golds, right, false in rows:
        for gold in golds:
            answers = [(answer, 1.0) for answer in right] + [(answer, 0.0) for answer in false]
            for answer, score in answers:
                output = answer if "boxed" in answer else rf"\boxed{{{answer}}}"
                if verify(output, gold).score != score:
                    wrong.append((kind, gold, answer, score, verify(output, gold)))
    assert wrong == []


@pytest.mark.parametrize(
    ("output", "method", "score"),
    [
        (r"#### \boxed{42}", "gsm8k", 1), (r"#### $\boxed{42}$", "gsm8k", 1), ("####\n42", "gsm8k", 1),
        ("#### 42", "gsm8k", 1), ("#### 41", "gsm8k", 0), (r"\boxed{42}", "gsm8k", 0),
        (r"#### \boxed{41}", "gsm8k", 0), ("#### 42\n#### 41", "gsm8k", 0), ("#### **42**", "gsm8k", 1),
        (r"Answer: \boxed{42}", "minerva", 1), (r"$\boxed{42}$", "minerva", 1), ("Answer:\n42", "minerva", 1),
        ("Answer: 41. Answer: 42", "minerva", 1), ("Answer: 42. Answer: 41", "minerva", 0),
        ("Answer：42", "minerva", 1), ("Answer: 42</answer>", "minerva", 1), ("Answer:\n\n**42**", "minerva", 1),
        ("Answer: 42 because 41 is too small", "minerva", 0), (r"Answer: 41, so \boxed{42}", "minerva", 1),
        ("答案：42", "minerva", 1), ("答案是 42", "minerva", 1), ("Antwort: 42", "minerva", 1),
        ("The answer is 42.", "minerva", 1), ("The answer is not 42.", "minerva", 0), ("42", "minerva", 0),
        ("<answer>42</answer>", "lenient", 1), ("<answer>41</answer>", "lenient", 0),
        ("**Final Answer**\n42", "lenient", 1), ("### Final Answer\n\n42", "lenient", 1),
        ("**Final Answer:** 42", "lenient", 1), ("**Final Answer**\n41", "lenient", 0),
        (r"<answer>\boxed{42}</answer>", "lenient", 1), ("<answer>42", "lenient", 0),
    ],
)  # fmt: skip
def test_places_of_an_answer(output, method, score):
    assert grade(output, "42", extraction=method).score == score


@pytest.mark.parametrize(
    ("gold", "output", "score"),
    [
        ("1, 2", r"\( x = \boxed{1} \) and \( y = \boxed{2} \)", 1),
        ("7", r"\( a = \boxed{3} \) and \( b = \boxed{7} \)", 0),
        ("1, 2", r"$x_1 = \boxed{1}$, $x_2 = \boxed{2}$", 1), ("1,1,2", r"\boxed{1}, \boxed{1}, \boxed{2}", 1),
        ("1,1,2", r"\boxed{1}, \boxed{2}, \boxed{2}", 0), ("7", r"\boxed{7}, \boxed{7}", 1),
        ("1, 2", r"\[ \theta = \boxed{2} \] and \[ \phi = \boxed{1} \]", 1),
    ],
)  # fmt: skip
def test_joined_boxes(gold, output, score):
    assert verify(output, gold).score == score


def test_numbers_by_hand():
    third, sixth = parse_number(r"0.\overline{3}"), parse_number(r"0.1666\ldots")
    assert third and third.value * 3 == 1 and not third.decimal
    assert sixth and sixth.value * 6 == 1
    rounded = parse_number("-1.50e3")
    assert rounded and rounded.value == -1500 and not rounded.decimal
    decimal = parse_number("0.0120")
    assert decimal and (decimal.significant, decimal.ulp * 10_000) == (3, 1)


def test_units_by_hand():
    assert canonical_unit(r"\text{ m s}^{-1}") == canonical_unit(r"\text{meters per second}") == "m s^-1"
    assert canonical_unit(r"\text{ square feet}") == canonical_unit(r"\text{ft}^2") == "ft^2"
    assert [parse_quantity(text).unit for text in ("5n", "5 km", r"5\text{ n}", r"5\text{ N}", "12_5", "5万")] == [
        "",
        "km",
        "",
        "n",
        "base 5",
        "",
    ]
    assert parse_quantity(r"12\text{ million dollars}").text == "12000000"


def test_expressions_by_hand():
    def same(a, b):
        return same_expression(parse_expression(a), parse_expression(b))

    assert same("x+y", "y+x") and not same("p+q-r", "x")
    assert same(r"\ln x^2", r"2\ln x") and not same(r"\sqrt{x^2}", "x")
    line = [parse_expression(side) for side in ("2x+3y", "6")]
    assert constant_ratio(line, [parse_expression(side) for side in ("4x+6y", "12")]) == 2
    assert constant_ratio(line, [parse_expression(side) for side in ("4x+6y", "11")]) is None
