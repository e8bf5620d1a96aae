"""What cannot work is refused in one line, with its key and the remedy, before a model is loaded."""

import pytest

from rltrain import cli
from rltrain.environments.calculator import Calculator, CalculatorConfig
from rltrain.environments.tags import cut
from rltrain.errors import ConfigError
from rltrain.policy.tiny import character_tokenizer
from rltrain.registry import part_of
from rltrain.rollout.observations import check_texts


@pytest.mark.parametrize(("words", "message"), [
    (["environment.max_turns=0"], "environment.max_turns=0: set at least 1"),
    (["environment.workers=0"], "environment.workers=0: set at least 1"),
    (["environment.reply_tokens=0"], "environment.reply_tokens=0: set at least 1"),
    (["environment.turn_tokens=-1"], "environment.turn_tokens=-1: must be >= 0; 0 sets no limit"),
    (["environment.reply_timeout_s=0"], "environment.reply_timeout_s=0.0: must be > 0 seconds"),
    (["environment.on_failure=retry"], "set one of wrong, abstain, tell"),
    (["environment.long_reply=drop"], "set one of cut, fail"),
    (
        ["environment.reply_tokens=256"],
        "environment.reply_tokens=256: a completion has sampling.max_new_tokens=256, replies included; lower the one",
    ),
    (["environment.turn_tokens=300"], "environment.turn_tokens=300: a completion has sampling.max_new_tokens=256"),
    (
        ["environment.batch_timeout_s=1000"],
        "environment.batch_timeout_s + reply_timeout_s = 1010: other ranks wait for at most deadline_s=1800",
    ),
    (["environment.tag='<calc>'"], "environment.tag='<calc>': not a tag; set a word such as calc, without < and >"),
    (["environment.tag=''"], "environment.tag='': not a tag"),
    (["environment.reply_format=result"], "environment.reply_format='result': must hold {} once"),
    (["environment.reply_format='{} {}'"], "environment.reply_format='{} {}': must hold {} once"),
])  # fmt: skip
def test_settings(words, message):
    refused(["environment=calculator", *words], message)


@pytest.mark.parametrize(("words", "message"), [
    ([], "environment.import_path: has no value"),
    (["environment.import_path=no_such:Game"], "import_path=no_such:Game: no module named no_such; install"),
    (["environment.import_path=no_such"], "environment.import_path=no_such: no module named no_such; install"),
    (["environment.import_path=user_environments:Nim"], "user_environments has no Nim"),
    (["environment.import_path=user_environments:a_number"], "a_number is int, not callable"),
    (["environment.import_path=user_environments:NoRespond"], "has no respond; write respond(state, text)"),
    (["environment.import_path=user_environments:NoArguments"], "respond: takes (text); give it the arguments (state,"),
    (["environment.import_path=user_environments:OneText"], "stop is 'abc'; give texts, such as ['</call>']"),
    (["environment.import_path=user_rewards:hangs"], "is not a class; name a class, or the module alone"),
    (["environment.import_path=user_environments"], "has no start; write start(problem)"),
    (["environment.import_path=module_environment", "+environment.options.a=1"], "is a module, which takes no"),
    (
        ["environment.import_path=user_environments:Guess", "+environment.options.lives=2"],
        "building it with environment.options={'lives': 2} raised TypeError",
    ),
])  # fmt: skip
def test_an_import_path(words, message):
    refused(["environment=custom", *words], message)


def test_programs_have_no_network():
    refused(["environment=python", "environment.network=true"], "programs of a model have no network; set it to false")


def refused(words, message):
    with pytest.raises(ConfigError) as error:
        cli.compose(words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_none_is_the_default_and_can_be_chosen():
    assert cli.compose([]).environment is None
    assert cli.compose(["environment=none"]).environment is None
    assert part_of(cli.compose(["environment=calculator"]).environment).name == "calculator"


def test_a_tag_that_the_tokenizer_cannot_write():
    config = CalculatorConfig(tag="rechne→")
    with pytest.raises(ConfigError) as error:
        check_texts((*Calculator(config).stop, *config.texts()), character_tokenizer())
    assert str(error.value) == (
        "environment: the tokenizer cannot write '</rechne→>' (it gives '</rechne<unk>>'); set another "
        "environment.tag, stop or reply_format, or another model"
    )
    check_texts((*Calculator(CalculatorConfig()).stop, *CalculatorConfig().texts()), character_tokenizer())


def test_a_cut_says_how_much_it_left_out():
    assert cut("abcdef", 6) == "abcdef"
    assert cut("abcdef", 4) == "abcd\n[2 more characters]"
