"""Prompts as text and ids: one BOS, no EOS, system messages first, continued turns, fixed dates, refusals by row."""

import pytest
from chat_tokenizers import CHATML, DATED, NO_SYSTEM, character_tokenizer

from rltrain.config import ModelConfig
from rltrain.errors import ConfigError
from rltrain.policy.encode import BadPrompt, chat_text, encode, encode_all, prompt_ids, turns, why_left_out
from rltrain.policy.load import Policy
from rltrain.policy.tokenizer import start_ids, text_ids
from rltrain.types import Problem

BOS, EOS = 1, 2
USER = [{"role": "user", "content": "Hi"}]


def ids(text: str) -> tuple[int, ...]:
    return tuple(character_tokenizer()(text, add_special_tokens=False)["input_ids"])


def policy(tokenizer) -> Policy:
    return Policy(model=None, tokenizer=tokenizer, stop_token_ids=(EOS,), pad_token_id=0)


@pytest.mark.parametrize(
    ("before", "after", "start"),
    [("", "", ()), ("<s>", "", (BOS,)), ("<s>", "</s>", (BOS,)), ("", "</s>", ()), ("<s> </s>", "", (BOS, EOS))],
)
def test_a_text_is_begun_once_and_not_ended(before, after, start):
    tokenizer = character_tokenizer(before=before, after=after)
    assert start_ids(tokenizer) == start
    assert text_ids(tokenizer, "1+1=") == start + ids("1+1=")
    assert text_ids(tokenizer, "") == start
    if before:
        assert text_ids(tokenizer, before.replace(" ", "") + "1") == start + ids("1")
    assert text_ids(tokenizer, "1</s>") == (*start, *ids("1"), EOS)  # what the text says itself stays


def test_a_rendered_chat_as_a_text_prompt_has_one_bos():
    tokenizer = character_tokenizer(before="<s>", template=NO_SYSTEM)
    text = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|user|>Hi<|end|><|assistant|>"
    expected = (BOS, *ids("<|user|>Hi<|end|><|assistant|>"))
    assert prompt_ids(tokenizer, text, ModelConfig()) == expected
    assert prompt_ids(tokenizer, USER, ModelConfig()) == expected
    assert prompt_ids(tokenizer, "Hi", ModelConfig(chat=True)) == expected


def test_order_of_system_examples_and_prompt():
    config = ModelConfig(chat=True, system="Be brief.", examples=[["1+1?", "2"], ["2+2?", "4"]])
    shown = [("user", "1+1?"), ("assistant", "2"), ("user", "2+2?"), ("assistant", "4")]

    def order(prompt):
        return [(turn["role"], turn["content"]) for turn in turns(prompt, config)]

    assert order("Hi") == [("system", "Be brief."), *shown, ("user", "Hi")]
    rows = [{"role": "system", "content": "Be long."}, *USER]
    assert order(rows) == [("system", "Be long."), *shown, ("user", "Hi")]
    assert order([rows[0], *rows]) == [("system", "Be long."), ("system", "Be long."), *shown, ("user", "Hi")]


def test_a_final_assistant_turn_is_continued():
    tokenizer = character_tokenizer(template=CHATML)
    prompt = [*USER, {"role": "assistant", "content": "The answer is"}]
    assert chat_text(tokenizer, prompt, ModelConfig()) == "<|user|>Hi<|end|><|assistant|>The answer is"


def test_tool_calls_reach_the_template():
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    prompt = [*USER, {"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "2"}]
    assert chat_text(character_tokenizer(template=CHATML), prompt, ModelConfig()) == (
        '<|user|>Hi<|end|><|assistant|><|end|>[{"function": {"name": "add", "arguments": {"a": 1}}}]'
        "<|tool|>2<|end|><|assistant|>"
    )


def test_keyword_arguments_reach_the_template():
    tokenizer = character_tokenizer(template=CHATML)
    config = ModelConfig(chat_template_kwargs={"thinking": False})
    assert chat_text(tokenizer, USER, config) == "<|user|>Hi<|end|><|assistant|><think></think>"


def test_the_clock_is_refused_or_fixed():
    tokenizer = character_tokenizer(template=DATED)
    with pytest.raises(ConfigError, match=r"^model.template_date: .*; set one, for example model.template_date=2024-"):
        chat_text(tokenizer, USER, ModelConfig())
    rest = "<|user|>Hi<|end|><|assistant|>"
    assert chat_text(tokenizer, USER, ModelConfig(template_date="2031-03-09")) == "<|date|>09 Mar 2031" + rest
    given = ModelConfig(chat_template_kwargs={"date_string": "today"})  # the clock is not read
    assert chat_text(tokenizer, USER, given) == "<|date|>today" + rest


def test_a_date_format_in_a_variable_and_inside_a_macro():
    template = (
        "{%- set style = \"%A, %Y\" %}{%- macro day() %}{{ strftime_now(style) + ' 100%' }}{% endmacro %}{{ day() }}"
    )
    tokenizer = character_tokenizer(template=template)
    assert chat_text(tokenizer, USER, ModelConfig(template_date="2024-07-26")) == "Friday, 2024 100%"
    made_up = character_tokenizer(template="{{ strftime_now('%' ~ 'Y') }}")
    with pytest.raises(BadPrompt, match="makes up its date format"):
        chat_text(made_up, USER, ModelConfig(template_date="2024-07-26"))


def test_a_date_format_over_two_lines():
    tokenizer = character_tokenizer(template="{{ strftime_now('%Y\n%d') }}{{ '100%\n' }}")
    assert chat_text(tokenizer, USER, ModelConfig(template_date="2024-07-26")) == "2024\n26100%\n"


HALF = "its text holds half a character (a lone surrogate)"
NAMED = "{% for message in messages %}{{ message.name }}{{ message.content }}{% endfor %}{{ place }}"


@pytest.mark.parametrize(
    ("prompt", "config", "reason"),
    [
        ([USER[0] | {"name": "\ud800"}], ModelConfig(), HALF),
        ("Hi", ModelConfig(chat=True, system="\ud800"), HALF),
        ("Hi", ModelConfig(chat=True, chat_template_kwargs={"place": "\udc00"}), HALF),
        (
            [{"role": "system", "content": "Be brief."}],
            ModelConfig(chat=True, examples=[["1+1?", "2"]]),
            "it holds system messages only, so that the last of model.examples would be continued",
        ),
    ],
)
def test_prompts_that_are_left_out(prompt, config, reason):
    source = policy(character_tokenizer(template=NAMED))
    problem = Problem(id="a", prompt=prompt, answer="")
    assert encode_all(source, [problem], config, max_prompt_tokens=99) == ([], [problem])
    assert why_left_out(source, problem, config, max_prompt_tokens=99) == f"a: {reason}"


def test_a_refused_system_role_names_the_remedy():
    source = policy(character_tokenizer(before="<s>", template=NO_SYSTEM))
    asked = Problem(id="train-7", prompt="Hi", answer="")
    with pytest.raises(BadPrompt) as error:
        encode(source, asked, ModelConfig(chat=True, system="Be brief."))
    assert str(error.value) == (
        "train-7: the chat template refuses its messages (System role not supported); if it knows no system role, "
        "unset model.system and put that text into data.prompt"
    )
    rows_own = Problem(id="train-8", prompt=[{"role": "system", "content": "Be brief."}, *USER], answer="")
    reason = why_left_out(source, rows_own, ModelConfig(), max_prompt_tokens=99)
    assert "move that message's text into the user's" in reason


def test_a_row_that_the_template_refuses_is_left_out_and_the_others_kept():
    source = policy(character_tokenizer(before="<s>", template=NO_SYSTEM))
    good = Problem(id="good", prompt=USER, answer="")
    twice = Problem(id="twice", prompt=[*USER, *USER], answer="")
    long = Problem(id="long", prompt=[{"role": "user", "content": "x" * 80}], answer="")
    prompts, dropped = encode_all(source, [good, twice, long], ModelConfig(), max_prompt_tokens=50)
    assert [prompt.problem for prompt in prompts] == [good]
    assert dropped == [twice, long]
    assert "twice: the chat template refuses its messages (Conversation roles must alternate)" in why_left_out(
        source, twice, ModelConfig(), max_prompt_tokens=50
    )
    # <s>, 8 + 80 + 7 characters of the turn, 13 of the header
    assert why_left_out(source, long, ModelConfig(), max_prompt_tokens=50).startswith("long: 109 tokens, over 50 (sam")


def test_messages_without_a_template_end_the_run():
    source = policy(character_tokenizer())
    with pytest.raises(ConfigError, match="^data.messages: the tokenizer has no chat template; ") as error:
        encode_all(source, [Problem(id="a", prompt=USER, answer="")], ModelConfig(), max_prompt_tokens=50)
    assert not isinstance(error.value, BadPrompt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template_date": "26.7.2024"}, "model.template_date=26.7.2024: not a date"),
        ({"chat_template_kwargs": {"tokenize": True}}, "model.chat_template_kwargs.tokenize: is set by rltrain"),
    ],
)
def test_impossible_configs_name_the_key(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**change)
