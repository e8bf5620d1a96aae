"""Multiple choice: letters, texts, and everything that only looks like a choice."""

import pytest

from rltrain.rewards.choice import ChoiceConfig, choice, options_of, verify_choice
from rltrain.types import Completion, Context, Group, Problem, Prompt

OPTIONS = {"A": "Aspirin", "B": "Beta blocker", "C": "Calcium", "D": "3"}
NONE = None

CASES = [
    (r"\boxed{C}", 1), (r"\boxed{c}", 1), (r"\boxed{(C)}", 1), (r"\boxed{\text{C}}", 1), (r"\boxed{\text{(C)}}", 1),
    (r"\boxed{C.}", 1), (r"\boxed{C)}", 1), (r"\boxed{[C]}", 1), (r"\boxed{**C**}", 1), (r"\boxed{\mathbf{C}}", 1),
    ("<answer>C</answer>", 1), ("<answer> (C) </answer>", 1), ("<answer>\nC\n</answer>", 1),
    ("<answer>option C</answer>", 1),
    ("<answer>The answer is C</answer>", 1), ("<answer>Answer: C</answer>", 1), ("<answer>(C) Calcium</answer>", 1),
    ("<answer>C. Calcium</answer>", 1), ("<answer>C) calcium.</answer>", 1), ("<answer>C: Calcium</answer>", 1),
    ("<answer>C - Calcium</answer>", 1), ("<answer>Calcium</answer>", 1), ("<answer>calcium.</answer>", 1),
    ("<answer>A</answer> no, <answer>C</answer>", 1), (r"<answer>A</answer> no, \boxed{C}", 1),
    (r"<answer>\boxed{C}</answer>", 1), (r"<think>A</think><answer>C</answer>", 1), (r"\boxed{C} \boxed{C}", 1),
    (r"\boxed{A}", 0), (r"\boxed{E}", 0), (r"\boxed{}", 0), (r"\boxed{C", 0), ("C", 0), ("The answer is C", 0),
    ("Clearly it is calcium.", 0), ("<answer>C", 0), ("<answer>A</answer><answer>C", 0), ("<answer></answer>", 0),
    ("<answer>(C) Aspirin</answer>", 0), ("<answer>(A) Calcium</answer>", 0), ("<answer>C. Beta blocker</answer>", 0),
    ("<answer>not C</answer>", 0), ("<answer>(C) is wrong</answer>", 0), ("<answer>C is incorrect</answer>", 0),
    ("<answer>A, C</answer>", 0), ("<answer>A or C</answer>", 0), ("<answer>A and C</answer>", 0),
    ("<answer>AC</answer>", 0),
    ("<answer>(A)(B)(C)(D)</answer>", 0), ("<answer>A. B. C. D.</answer>", 0), ("<answer>neither A nor B</answer>", 0),
    (r"\boxed{A}, \boxed{C}", 0), ("<answer>2</answer>", 0),
    ("<answer>3</answer>", 0), ("<answer>option 3</answer>", 0),
    ("<answer>Cal</answer>", 0), ("<answer>Calcium or aspirin</answer>", 0), ("<answer>all of them</answer>", 0),
    ("<think><answer>C</answer>", 0), ("<think>a</think>b</think><answer>C</answer>", 0),
    ("<answer>" + "C" * 5000 + "</answer>", 0), ("<answer>C\x00</answer>", 0), ("<answer>Ć</answer>", 0),
]  # fmt: skip


@pytest.mark.parametrize(("output", "score"), CASES)
def test_choices(output, score):
    assert verify_choice(output, "C", OPTIONS).score == score


@pytest.mark.parametrize(
    ("output", "gold", "score"),
    [
        ("<answer>3</answer>", "D", 1),
        ("<answer>D</answer>", "3", 1),
        ("<answer>(B) Beta-blocker</answer>", "B", 0),
        ("<answer>beta  blocker</answer>", "B", 1),
        ("<answer>C</answer>", "(C)", 1),
        ("<answer>C</answer>", "Calcium", 1),
        ("<answer>C</answer>", "E", None),
        ("<answer>C</answer>", "Zinc", None),
    ],
)
def test_option_text_and_golds(output, gold, score):
    assert verify_choice(output, gold, OPTIONS).score == score


BLOOD = {"A": "O", "B": "A", "C": "AB", "D": "B"}
DOSES = {"A": "Ibuprofen 200 mg", "B": "Ibuprofen 400 mg", "C": "Aspirin 100 mg", "D": "5%"}
SHARES = {"A": r"$\frac{1}{2}$", "B": r"$\frac{1}{3}$", "C": r"$x^2-1$", "D": "3"}


@pytest.mark.parametrize(
    ("output", "gold", "options", "score"),
    [
        (r"\boxed{B}", "B", BLOOD, 1), (r"\boxed{B}", "D", BLOOD, 0), (r"\boxed{A}", "A", BLOOD, 1),
        (r"\boxed{A}", "B", BLOOD, 0), (r"\boxed{O}", "A", BLOOD, 1), (r"\boxed{AB}", "C", BLOOD, 1),
        (r"\boxed{(D) B}", "D", BLOOD, 1), (r"\boxed{(B) B}", "D", BLOOD, 0), (r"\boxed{5\%}", "D", DOSES, 1),
        (r"\boxed{5}", "D", DOSES, 1), (r"\boxed{50\%}", "D", DOSES, 0), (r"\boxed{D. 5\%}", "D", DOSES, 1),
        (r"\boxed{B Ibuprofen 400 mg}", "B", DOSES, 1), (r"\boxed{B \text{ (Ibuprofen 400 mg)}}", "B", DOSES, 1),
        (r"\boxed{B, Ibuprofen 400 mg}", "B", DOSES, 1), (r"\boxed{B Ibuprofen 200 mg}", "B", DOSES, 0),
        (r"\boxed{A \text{ (Ibuprofen 400 mg)}}", "A", DOSES, 0), (r"\boxed{B Aspirin 100 mg}", "B", DOSES, 0),
        (r"\boxed{C) Aspirin}", "C", DOSES, 1), (r"\boxed{B) Ibuprofen}", "B", DOSES, 0),
        (r"\boxed{B) Aspirin}", "B", DOSES, 0), (r"\boxed{C) Aspi}", "C", DOSES, 0),
        (r"\boxed{\dfrac13}", "B", SHARES, 1), (r"\boxed{0.5}", "A", SHARES, 1),
        (r"\boxed{\dfrac13}", "A", SHARES, 0), (r"\boxed{(x-1)(x+1)}", "C", SHARES, 1),
        (r"\boxed{(x+1)^2}", "C", SHARES, 0), (r"\boxed{(B)\ \frac{2}{6}}", "B", SHARES, 1),
        (r"\boxed{(B)\ \frac{2}{4}}", "B", SHARES, 0), (r"\boxed{3.0}", "D", SHARES, 1),
    ],
)  # fmt: skip
def test_letters_texts_and_values_of_options(output, gold, options, score):
    assert verify_choice(output, gold, options).score == score


def test_without_known_options_text_after_the_letter_is_free_but_neither_denies_nor_lists():
    assert verify_choice("<answer>(C) Calcium</answer>", "C").score == 1.0
    assert verify_choice("<answer>(C) is not right</answer>", "C").score == 0.0
    assert verify_choice("<answer>(C) or (D)</answer>", "C").score == 0.0
    assert verify_choice("<answer>Calcium</answer>", "C").score == 0.0


def test_text_that_two_options_share_chooses_neither():
    assert verify_choice("<answer>yes</answer>", "A", {"A": "Yes", "B": "yes", "C": "no"}).score == 0.0


def test_lenient_reads_the_answer_line():
    assert verify_choice("Answer: (C)", "C", OPTIONS).score == 0.0
    assert verify_choice("Answer: (C)", "C", OPTIONS, strict=False).score == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"a": "yes", "B": "no"},
        ["yes", "no"],
        [{"key": "A", "value": "yes"}, {"key": "b", "value": "no"}],
        {"label": ["A", "B"], "text": ["yes", "no"]},
    ],
)
def test_forms_of_options(options):
    assert options_of({"options": options}) == {"A": "yes", "B": "no"}
    assert options_of({"level": 3}) == {}


@pytest.mark.parametrize("key", ["choices", "options"])
def test_reward_reads_the_options_of_the_problem(key):
    texts = ["<answer>Aspirin</answer>", "<answer>A</answer>", "<answer>B</answer>", "none"]
    completions = tuple(Completion(token_ids=(1,), logprobs=(0.0,), finish="stop", text=text) for text in texts)
    problem = Problem(id="p", prompt="q", answer="A", meta={key: ["Aspirin", "Zinc"]})
    result = choice(
        [Group(prompt=Prompt(problem=problem, token_ids=(1,)), completions=completions)], ChoiceConfig(), Context()
    )
    assert result.scores == [[1.0, 1.0, 0.0, 0.0]]
    assert (result.metrics["choice/extracted"].total, result.metrics["choice/extracted"].count) == (3, 4)
