"""Tags: one pair each, in order, not blank, with or without a prefilled opening."""

import pytest

from rltrain.errors import ConfigError
from rltrain.rewards.format import FormatConfig, format_reward, opens_thinking, well_formed
from rltrain.types import Completion, Context, Group, Problem, Prompt

BOTH = ["think", "answer"]


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("<think>a</think><answer>b</answer>", True),
        ("\n<think>\na\n</think>\n\n<answer>b</answer>\n", True),
        ("<think>a</think><answer></answer>", False),
        ("<think> \n</think><answer>b</answer>", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<think>a<answer>b</answer></think>", False),
        ("<think>a</think>text<answer>b</answer>", False),
        ("text<think>a</think><answer>b</answer>", False),
        ("<think>a</think><answer>b</answer>text", False),
        ("<think>a</think><think>a</think><answer>b</answer>", False),
        ("<think>a</think></think><answer>b</answer>", False),
        ("<think>a</think><answer>b", False),
        ("a</think><answer>b</answer>", False),
        ("<Think>a</Think><answer>b</answer>", False),
        ("", False),
    ],
)
def test_both_tags(text, good):
    assert well_formed(text, BOTH) is good


def test_prefilled_opening_counts_once():
    assert well_formed("a</think><answer>b</answer>", BOTH, prefilled=True)
    assert not well_formed("<think>a</think><answer>b</answer>", BOTH, prefilled=True)


def test_thinking_alone_needs_an_answer_after_it():
    assert well_formed("<think>a</think> so 5", ["think"])
    assert not well_formed("<think>a</think> ", ["think"])


def test_box_after_the_tags():
    assert well_formed(r"<think>\boxed{1}</think> so \boxed{5}", ["think"], box=True)
    assert not well_formed(r"<think>a</think> so \boxed{5} or \boxed{6}", ["think"], box=True)
    assert not well_formed(r"<think>a</think> so \boxed{5", ["think"], box=True)
    assert not well_formed(r"<think>a</think> so \boxed{ }", ["think"], box=True)


class Decoder:
    def decode(self, ids):
        return "".join(chr(one) for one in ids)


def prompt(text, ids=(1,)):
    return Prompt(problem=Problem(id="p", prompt=text, answer=""), token_ids=ids)


def test_prefill_is_seen_in_text_messages_and_ids():
    assert opens_thinking(prompt("q\n<think>\n"))
    assert opens_thinking(prompt([{"role": "assistant", "content": "<think>"}]))
    assert opens_thinking(prompt("q", ids=tuple(map(ord, "assistant\n<think>\n"))), Decoder())
    assert not opens_thinking(prompt("q <think> is a tag", ids=(65,)), Decoder())


def test_reward():
    texts = ["a</think><answer>b</answer>", "no"]
    completions = tuple(Completion(token_ids=(1,), logprobs=(0.0,), finish="stop", text=text) for text in texts)
    result = format_reward([Group(prompt=prompt("q<think>"), completions=completions)], FormatConfig(), Context())
    assert result.scores == [[1.0, 0.0]]
    assert result.metrics["format/well_formed"].total == 1.0


def test_rules():
    with pytest.raises(ConfigError, match="nothing to check"):
        FormatConfig(tags=[])
    with pytest.raises(ConfigError, match="named twice"):
        FormatConfig(tags=["a", "a"])
