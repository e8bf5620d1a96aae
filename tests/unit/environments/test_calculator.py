"""The calculator: exact values, refusals in a few words, and sizes that stay bounded."""

import contextlib
import time

import pytest

from rltrain.environments.arithmetic import CalculationError, calculate
from rltrain.environments.calculator import Calculator, CalculatorConfig
from rltrain.types import Problem, Reply


@pytest.mark.parametrize(("text", "value"), [
    ("12*3", "36"),
    ("17+16-7", "26"),
    ("(3+4)*2", "14"),
    ("7/2", "7/2"),
    ("1/3+1/6", "1/2"),
    ("-7/-21", "1/3"),
    ("2-3*4", "-10"),
    ("8/4/2", "1"),
    ("1/2-3/4", "-1/4"),
    ("2^10", "1024"),
    ("2**3^2", "512"),  # 2^(3^2)
    ("-2^2", "-4"),
    ("(-2)^2", "4"),
    ("2^-2", "1/4"),
    ("0.1+0.2", "3/10"),
    ("1.50", "3/2"),
    (".5*4", "2"),
    ("3.", "3"),
    ("3 × 4 ÷ 6 − 1", "1"),
    ("--3", "3"),
    ("10^40", "1" + "0" * 40),
    (" 1 +\n1 ", "2"),
])  # fmt: skip
def test_values_are_exact(text, value):
    assert calculate(text) == value


@pytest.mark.parametrize(("text", "cause"), [
    ("1/0", "division by zero"),
    ("1/(2-2)", "division by zero"),
    ("0^-1", "division by zero"),
    ("", "incomplete"),
    ("3+", "incomplete"),
    ("(3", "incomplete"),
    ("3)", "incomplete"),
    ("3 4", "incomplete"),
    ("*3", "incomplete"),
    ("()", "incomplete"),
    ("(" * 40 + "1" + ")" * 40, "too deep"),
    ("2^-(" * 40 + "1" + ")" * 40, "too deep"),
    ("2^65", "exponent"),
    ("4^(1/2)", "exponent"),
    ("9^9^9^9", "exponent"),
    ("(10^50)^50", "too large"),
    ("(10^60)*(10^60)", "too large"),
    ("9" * 101, "too large"),
    ("1" * 257, "too long"),
    ("__import__('os')", "not a number or + - * / ^ ( )"),
    ("x+1", "not a number or + - * / ^ ( )"),
    ("1e9", "not a number or + - * / ^ ( )"),
    ("١+١", "not a number or + - * / ^ ( )"),  # digits of another script
])  # fmt: skip
def test_what_has_no_value_is_said_in_a_few_words(text, cause):
    with pytest.raises(CalculationError) as error:
        calculate(text)
    assert str(error.value) == cause


def calculator(**settings):
    return Calculator(CalculatorConfig(**settings))


PROBLEM = Problem(id="a", prompt="?", answer="36")


def test_a_call_is_answered_and_a_turn_without_one_ends():
    tool = calculator(call_reward=0.25)
    first = tool.respond(tool.start(PROBLEM), "I need <calc>12*3</calc>")
    assert first == Reply(text="<result>36</result>", state=["36"], called=True, reward=0.25)
    second = tool.respond(first.state, "<calc>1/0</calc>")
    assert second == Reply(
        text="<result>error: division by zero</result>", state=["36", "error: division by zero"], called=True
    )
    assert tool.respond(second.state, "so \\boxed{36}") == Reply(text="", state=second.state, done=True)
    assert (tool.key([]), tool.key(["36", "4"])) == ("", "36 4")
    assert first == tool.respond([], "I need <calc>12*3</calc>")  # the state that was given is as it was


@pytest.mark.parametrize(("text", "asked"), [
    ("<calc>1</calc>", "1"),
    ("<calc>1</calc> and more of the token", "1"),
    ("<calc>1</calc> then <calc>2</calc>", "2"),
    ("<calc><calc>3</calc>", "3"),
    ("<calc>1", None),
    ("<calc>1</calc><calc>2", None),
    ("1</calc>", None),
    ("</calc><calc>", None),
])  # fmt: skip
def test_the_last_call_counts_if_it_was_closed(text, asked):
    assert CalculatorConfig().call_in(text) == asked


def test_tag_and_format_are_free():
    tool = calculator(tag="c", reply_format="={}\n", role="tool")
    assert (tool.stop, tool.role) == (("</c>",), "tool")
    assert tool.respond([], "<c>2*{}</c>").text == "=error: not a number or + - * / ^ ( )\n"
    assert tool.respond([], "<c>7/2</c>").text == "=7/2\n"
    assert tool.config.told("no reply within 1 s") == "=error: no reply within 1 s\n"


def test_no_text_takes_long():
    """256 characters of the costliest kinds; in processor time, with a bound a thousand times what it takes."""
    texts = ["99^64*" * 42, "1/3+" * 63 + "1", "-" * 255 + "1", "9" * 99 + "*" + "9" * 99, "1/7^40+" * 36]
    before = time.process_time()
    for text in texts:
        with contextlib.suppress(CalculationError):
            calculate(text)
    assert time.process_time() - before < 5
