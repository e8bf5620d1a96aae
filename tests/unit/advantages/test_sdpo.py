import dataclasses

import pytest
import torch
from table_scorer import TableScorer
from tiny_run import config

from rltrain.advantages.sdpo import SDPOConfig, reprompted, sdpo, shown_solution, solutions
from rltrain.data.text import CutConfig, Document
from rltrain.errors import ConfigError, RunError
from rltrain.types import Completion, Context, Group, Problem, Prompt

TEXTS = ["why</think> 42\n", "7", "so</think>43", "</think>  "]
TEMPLATE = "{prompt}|{solution}|"


def group_of(rewards, texts=TEXTS, prompt="2+2="):
    completions = tuple(
        Completion(token_ids=ids(text), logprobs=(0.0,) * len(text), finish="stop", text=text) for text in texts
    )
    problem = Problem(id="p", prompt=prompt, answer="")
    return Group(
        prompt=Prompt(problem=problem, token_ids=ids("2+2=")), completions=completions, rewards_G=torch.tensor(rewards)
    )


def ids(text):
    return tuple(ord(character) for character in text)


def context_of():
    """Under the policy a character costs 1 nat, under the teacher a hundredth of what stands before it."""
    tables = {"policy": lambda before, _: -1.0, "phi": lambda before, _: -0.01 * len(before)}
    return Context(scorer=TableScorer(tables), encode=ids)


def test_the_first_other_solution_is_shown_without_its_thinking():
    """Of the rewards 1, 0, 1, 1 the last has nothing left without its thinking."""
    assert [shown_solution(text) for text in TEXTS] == ["42", "7", "43", ""]
    assert solutions(TEXTS, [1.0, 0.0, 1.0, 1.0], SDPOConfig()) == [["43"], ["42", "43"], ["42"], ["42", "43"]]
    assert solutions(TEXTS, [0.5, 0.49, None, 0.0], SDPOConfig()) == [[], ["42"], ["42"], ["42"]]
    assert solutions(["a</s>b", "c"], [1.0, 1.0], SDPOConfig(think_close="</s>")) == [["c"], ["b"]]


def test_by_hand():
    """The second completion "7" after "2+2=|42|" (8 characters): -0.08 + 1. "so</think>43" has twelve characters."""
    group = group_of([1.0, 0.0, 0.5, 0.0])
    found = sdpo([group], SDPOConfig(reprompt=TEMPLATE), context := context_of())
    assert found.values[0][1].tolist() == pytest.approx([1 - 0.08])
    assert found.values[0][2].tolist() == pytest.approx([1 - 0.01 * (8 + t) for t in range(12)])
    assert found.values[0][0].tolist() == pytest.approx([1 - 0.01 * (8 + t) for t in range(len(TEXTS[0]))])
    shown = ["2+2=|43|", "2+2=|42|", "2+2=|42|", "2+2=|42|"]
    teachers = context.scorer.asked[:4]
    assert [one.token_ids for one in teachers] == [ids(a + b) for a, b in zip(shown, TEXTS, strict=True)]
    assert [one.token_ids for one in context.scorer.asked[4:]] == [ids("2+2=" + text) for text in TEXTS]
    assert (found.metrics["sdpo/taught_share"].total, found.metrics["sdpo/taught_share"].count) == (4, 4)


def test_completions_without_another_solution_carry_nothing():
    """Only the first is right: it has no teacher itself. The third abstains."""
    found = sdpo([group_of([1.0, 0.0, torch.nan, 0.0])], SDPOConfig(reprompt=TEMPLATE), context := context_of())
    assert [bool(row.any()) for row in found.values[0]] == [False, True, False, True]
    assert len(context.scorer.asked) == 4 and found.metrics["sdpo/taught_share"].total == 2
    nothing = sdpo([group_of([0.0, 0.0, 0.0, 0.0])], SDPOConfig(), context_of())
    assert not any(bool(row.any()) for row in nothing.values[0])


def test_equal_rewards_teach():
    found = sdpo([group_of([1.0, 1.0, 1.0, 1.0])], SDPOConfig(), context_of())
    assert all(bool(row.all()) for row in found.values[0])


def test_a_reprompt_over_the_limit_gives_way_to_the_next():
    """A limit of 8 characters: the first solution is too long, the second fits; where none fits nothing is learnt."""
    group = group_of([1.0, 1.0, 0.0], texts=["4200", "42", "7"])
    found = sdpo([group], SDPOConfig(reprompt=TEMPLATE, max_reprompt_tokens=8), context := context_of())
    assert [bool(row.any()) for row in found.values[0]] == [True, False, True]
    assert [one.token_ids for one in context.scorer.asked[:2]] == [ids("2+2=|42|4200"), ids("2+2=|42|7")]
    assert found.metrics["sdpo/too_long_share"].total == 1


def test_texts_are_put_in_as_they_stand():
    assert reprompted("a {solution}", "b {prompt}", TEMPLATE) == "a {solution}|b {prompt}|"


def test_chat_messages_keep_what_stands_before_the_question():
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2?", "name": "x"}]
    assert reprompted(messages, "4", TEMPLATE) == [messages[0], {"role": "user", "content": "2+2?|4|", "name": "x"}]
    for last in ({"role": "assistant", "content": "So"}, {"role": "user", "content": [{"type": "image"}]}):
        with pytest.raises(RunError, match="the last message of a problem is not a text of the user"):
            reprompted([*messages, last], "4", TEMPLATE)


def test_a_prompt_of_token_ids_is_refused():
    group = group_of([1.0, 1.0, 1.0, 1.0])
    problem = Document(id="d", prompt="3+4=7", answer="", config=CutConfig(min_prefix=4, max_prefix=4))
    group = dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, problem=problem))
    with pytest.raises(RunError, match="problem d makes its prompt of token ids"):
        sdpo([group], SDPOConfig(), context_of())


def test_without_a_model_no_reprompt_is_made():
    context = dataclasses.replace(context_of(), encode=Context().encode)
    with pytest.raises(RunError, match="context.encode: there is no model here"):
        sdpo([group_of([1.0, 1.0, 0.0, 0.0])], SDPOConfig(), context)


@pytest.mark.parametrize(("overrides", "message"), [
    (["advantage.reprompt='{prompt}'"], r"lacks \{solution\}; add it"),
    (["advantage.think_close=''"], "advantage.think_close is empty"),
    (["advantage.max_reprompt_tokens=0"], "advantage.max_reprompt_tokens=0: set at least 1"),
    (["scorer.kind=policy"], "the teacher of self-distillation is an average of the policy; set scorer.kind=ema"),
    (["sampling.top_p=0.9"], "sampling.temperature=1, top_k=0, top_p=0.9: self-distillation compares"),
])  # fmt: skip
def test_what_cannot_work_is_named(overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, "algorithm=sdpo", *overrides)
