"""What a command line is refused for: unknown keys, text that Hydra's grammar reads otherwise, choices made twice."""

import logging
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from rltrain import cli
from rltrain.errors import ConfigError
from rltrain.options import keys, overrides


def said(*words: str) -> str:
    """The one line about these words, checked and composed as the command line is."""
    with pytest.raises(Exception) as error:
        cli.store_nodes()
        cli.compose(cli.checked_overrides(list(words)))
    message = cli.one_line(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("words", [
    ["+loss.kl_ceof=1"], ["++loss.kl_ceof=1"], ["loss.kl_ceof=1"],
])  # fmt: skip
def test_a_key_that_no_dataclass_has_is_refused_however_it_is_given(words):
    assert said(*words) == "loss.kl_ceof: no such key; did you mean loss.kl_coef?"


@pytest.mark.parametrize("key", [
    "nothing_of_the_kind", "sampling.min_p", "model.lora.x", "rewards.answer.x", "watchdog.x", "data.x", "rollout.x",
    "advantage.options",
])  # fmt: skip
def test_a_plus_adds_no_key_at_any_depth(key):
    assert said(f"+{key}=1").startswith(f"{key}: no such key; ")


def test_free_dictionaries_stay_free():
    config = cli.compose(["+deepspeed.extra.zero_optimization.anything=3"])
    assert config.deepspeed.extra == {"zero_optimization": {"anything": 3}}
    path = "advantage.import_path=user_estimators:one_value_per_completion"
    part = ["advantage=custom", path, "+advantage.options={tokens: {deep: 8}}"]
    assert cli.compose(part).advantage.options == {"tokens": {"deep": 8}}  # type: ignore[attr-defined]


@pytest.mark.parametrize(("key", "meant"), [
    ("optimizer.lr", "optimizer.learning_rate"),
    ("lr", "optimizer.learning_rate"),
    ("learning_rate", "optimizer.learning_rate"),
    ("optimzer.learning_rate", "optimizer.learning_rate"),
    ("optimizer.learing_rate", "optimizer.learning_rate"),
    ("cold_start.lr", "cold_start.learning_rate"),
    ("kl", "loss.kl_coef"),
    ("beta", "loss.kl_coef"),
    ("loss.beta", "loss.kl_coef"),
    ("optimizer.beta", "optimizer.betas"),
    ("algorithm.kl_coef", "loss.kl_coef"),
    ("num_generations", "batch.group_size"),
    ("batch.groupsize", "batch.group_size"),
    ("group_size", "batch.group_size"),
    ("max_tokens", "sampling.max_new_tokens"),
    ("rollout.temperature", "sampling.temperature"),
    ("model.lora_rank", "model.lora.rank"),
    ("lora.rank", "model.lora.rank"),
    ("actor.optim.lr", "optimizer.learning_rate"),
    ("data.max_prompt_length", "sampling.max_prompt_tokens"),
    ("output_dir", "run_dir"),
    ("max_steps", "steps"),
    ("rewards.answer.wieght", "rewards.answer.weight"),
    ("reward.weight", "rewards.answer.weight"),
    ("use_vllm", "rollout=vllm"),
])  # fmt: skip
def test_suggestions_are_right_and_whole(key, meant):
    assert said(f"{key}=1") == f"{key}: no such key; did you mean {meant}?"


@pytest.mark.parametrize("key", ["zzz", "output.folder", "trainer.urls", "rewards.answer.x"])
def test_far_keys_get_no_guess(key):
    assert said(f"{key}=1") == f"{key}: no such key; rltrain help keys lists them"


@pytest.mark.parametrize(("key", "told"), [
    ("model.lora.x", "the keys of model.lora are rank, alpha, dropout, target_modules"),
    (
        "rollout.x",
        "the keys of rollout are ahead, device_offset, tree; rltrain help rollout lists those of its choices",
    ),
    ("advantage.x", "rltrain help advantage lists those of its choices"),
])  # fmt: skip
def test_far_keys_of_a_section_get_its_keys(key, told):
    assert said(f"{key}=1") == f"{key}: no such key; {told}"


@pytest.mark.parametrize("key", ["urls", "vllm.urls", "rollot.urls"])
def test_a_key_of_a_choice_is_meant_alone_or_behind_its_place_or_name(key):
    assert said(f"{key}=1") == f"{key}: no such key; did you mean rollout.urls? (of rollout=vllm)"


def test_every_synonym_leads_to_a_key_that_exists():
    known = keys.known_keys()
    assert [path for path in keys.SYNONYMS if path not in known and "=" not in path] == []


def test_a_key_of_another_part_names_the_part():
    assert said("rollout.urls=[x]") == "rollout.urls: no such key; it belongs to rollout=vllm, which is not chosen"
    assert said("data.answer=x").startswith("data.answer: no such key; it belongs to data=hub")


@pytest.mark.parametrize(
    ("words", "key", "owner", "needed"),
    [
        (["data=hub", "data.path=x"], "data.meta.level", "data.meta", " (of data=hub)"),
        ([], "model.chat_template_kwargs.enable_thinking", "model.chat_template_kwargs", ""),
        ([], "deepspeed.extra.a.b", "deepspeed.extra", ""),
    ],
)
def test_a_name_of_a_mapping_needs_a_plus(words, key, owner, needed):
    message = f"{key}: no such key; {owner} takes any name, added with a plus: +{key}=VALUE{needed}"
    assert said(*words, f"{key}=1") == message


def test_a_reward_that_is_not_chosen():
    for word in ("rewards.brevity.weight=1", "+rewards.brevity.weight=1"):
        assert said(word) == (
            "rewards.brevity: no reward is chosen by this name; choose it first: +reward@rewards.brevity=NAME"
        )


def test_an_unknown_key_in_a_file_names_the_file(tmp_path):
    import hydra

    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\noptimizer: {lr: 1e-3}\n")
    cli.store_nodes()
    with (
        hydra.initialize_config_dir(version_base="1.3", config_dir=str(cli.config_folder())),
        pytest.raises(Exception) as error,
    ):
        hydra.compose("config", overrides=[f"hydra.searchpath=[file://{tmp_path}]", "+experiment=mine"])
    assert cli.one_line(error.value) == (
        "experiment/mine: optimizer.lr: no such key; did you mean optimizer.learning_rate?"
    )


def test_a_choice_that_does_not_exist_gets_the_nearest():
    assert said("advantage=tempoo").endswith("did you mean advantage=tempo?")
    assert said("+experiment=zzz").endswith("rltrain list shows the choices")
    assert said("model=42") == "model=42: not the name of a choice; rltrain list shows the choices"


UNREADABLE = [
    "{question}", "a=b", "/a b/(c), d", "é", 'a"b', 'a\\"b', "it's {x}", '"x" and "y"', '"{q} = ', "'a", "[a", "x#y",
    "日本", "<q>", "!", "{question}\\n{x}", "a,b", "$[x", "{x}\\",
]  # fmt: skip


@pytest.mark.parametrize("value", UNREADABLE)
def test_what_must_be_quoted_is_shown_as_it_must_be_typed(value):
    """The override that is shown, taken through a shell's reading and Hydra's, is the text."""
    message = said("data=hub", f"data.prompt={value}")
    assert message.startswith(f"data.prompt: the value {value} ")
    (word,) = shlex.split(message.partition("; quote it: ")[2])
    parsed = OverridesParser.create().parse_override(word)
    assert (parsed.key_or_group, parsed.value()) == ("data.prompt", value)


def test_the_quoting_of_the_commonest_case():
    assert said("data=hub", "data.prompt={question}").endswith("""quote it: 'data.prompt="{question}"'""")
    assert said("data=hub", "data.path=/a/b=c").endswith("""quote it: 'data.path="/a/b=c"'""")
    assert said("debug.bundle_steps=1,2").endswith("quote it: 'debug.bundle_steps=[1,2]'")


@pytest.mark.parametrize(("word", "read"), [
    ("name=1_000", "1000"), ("name=12e456", "inf"), ("name=true", "True"), ("name= a", "a"),
])  # fmt: skip
def test_text_that_was_read_as_something_else_is_refused(word, read):
    import hydra

    cli.store_nodes()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(cli.config_folder())):
        composed = hydra.compose("config", overrides=[word])
    value = word.partition("=")[2]
    with pytest.raises(ConfigError) as error:
        overrides.check_texts([word], composed)
    assert str(error.value) == f"""name: the text {value!r} is read as {read!r}; quote it: 'name="{value}"'"""
    overrides.check_texts(["name=plain", "seed=1_000", "batch.group_size=8"], composed)


def test_a_group_chosen_twice_is_an_error():
    message = said("algorithm=grpo", "algorithm=dapo")
    assert message == "algorithm: chosen twice (algorithm=grpo and algorithm=dapo); keep the choice you mean"
    assert "chosen twice" in said("advantage=tempo", "advantage=group")
    assert "chosen twice" in said("+experiment=rlp", "+experiment=quickstart")
    assert "chosen twice" in said("reward@rewards.answer=boxed", "+reward@rewards.answer=gsm8k")
    assert cli.checked_overrides(["algorithm=dapo", "algorithm=dapo"]) == ["algorithm=dapo", "algorithm=dapo"]
    assert cli.checked_overrides(["reward@rewards.answer=boxed", "+reward@rewards.more=gsm8k"])


def test_of_a_key_set_twice_the_last_counts_and_it_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        cli.checked_overrides(["steps=2", "steps=25", "seed=1", "seed=1"])
    assert [record.getMessage() for record in caplog.records] == [
        "steps: set twice, to 2 and then to 25; the last counts"
    ]


@pytest.mark.parametrize(("word", "remedy"), [
    ("--seed=3", "--seed=3: not a flag; write seed=3, without dashes"),
    ("--learning-rate=3", "--learning-rate=3: not a flag; write learning_rate=3, without dashes"),
    ("seed", "seed: not of the form key=value; write seed=VALUE"),
    ("seed:3", "seed:3: not of the form key=value; write seed=3"),
    ("=3", "=3: not of the form key=value; write key=value"),
])  # fmt: skip
def test_what_is_no_override(word, remedy):
    assert said(word) == remedy


def test_sweeps_may_list_values():
    assert cli.checked_overrides(["--multirun", "seed=1,2"]) == []
