"""The text after a thought against the target that was cut off."""

import pytest

from rltrain.data.text import CutConfig, Document
from rltrain.errors import ConfigError
from rltrain.policy.tiny import character_tokenizer
from rltrain.rewards.target_text import TargetTextConfig, target_text
from rltrain.types import Completion, Context, Group, Problem, Prompt

TOKENIZER = character_tokenizer()


def group_of(*texts, thinks=True, horizon=0):
    config = CutConfig(after="=", horizon=horizon, min_prefix=5, max_prefix=5)
    document = Document(id="d", prompt="12+3=15.", answer="15", config=config, thinks=thinks)
    ids = [tuple(TOKENIZER(text)["input_ids"]) for text in texts]
    completions = [
        Completion(token_ids=one, logprobs=(-1.0,) * len(one), finish="stop", text=text)
        for one, text in zip(ids, texts, strict=True)
    ]
    return Group(prompt=document.encode(TOKENIZER, lambda text: ()), completions=tuple(completions))


def scored(group):
    return target_text([group], TargetTextConfig(), Context(tokenizer=TOKENIZER))


def test_after_an_opened_thought_its_end_and_the_whole_rest_must_stand():
    result = scored(
        group_of("x</think>15.", "</think>15.", "x</think>15", "x</think>15.6", "15.", "a</think>b</think>15.")
    )
    assert result.scores == [[1, 1, 0, 0, 0, 1]]
    assert result.metrics["target_text/thoughts"].total == 5


def test_without_a_thought_in_the_prompt_one_may_be_opened():
    assert scored(group_of("15.", "<think>7</think>15.", "<think>15.", thinks=False)).scores == [[1, 1, 0]]


def test_a_horizon_of_tokens_asks_for_a_beginning():
    assert scored(group_of("</think>15", "</think>1", "</think>2", horizon=1)).scores == [[1, 1, 0]]


def test_prompts_that_are_not_cut_are_a_config_error():
    group = Group(prompt=Prompt(problem=Problem(id="q1", prompt="", answer=""), token_ids=(5,)), completions=())
    with pytest.raises(ConfigError, match="needs a document that is cut, and q1 is not"):
        scored(group)
