"""A tokenizer that is missing, or does not fit the model or the keys, is one line."""

import json

import pytest
from chat_tokenizers import CHATML, DATED, character_tokenizer, small_model

from rltrain.config import ModelConfig
from rltrain.errors import ConfigError
from rltrain.policy.load import PretrainedConfig, load_frozen, load_policy
from rltrain.policy.tokenizer import check_tokenizer, load_tokenizer, pad_token_id


@pytest.fixture
def folder(tmp_path):
    tokenizer = character_tokenizer(template=CHATML)
    small_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(**changes) -> str:
    with pytest.raises(ConfigError) as error:
        load_policy(PretrainedConfig(**changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_without_tokenizer_files(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    message = refusal(path=str(folder))
    assert message.startswith(f"model.path={folder}: no tokenizer, it has no token for any letter or digit; copy token")


def test_a_broken_tokenizer_file(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    message = refusal(path=str(folder))
    assert message.startswith(f"model.path={folder}: ")
    assert "tokenizer.json" in message


def test_more_tokens_than_embeddings(folder):
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(folder)
    assert refusal(path=str(folder)) == (
        "model: the tokenizer has 106 tokens, the model embeddings for 104; take the model's own tokenizer, or save "
        "the model after resize_token_embeddings"
    )


def test_spare_embeddings_are_no_fault(folder):
    small_model(128).save_pretrained(folder)
    assert load_policy(PretrainedConfig(path=str(folder))).model.get_input_embeddings().num_embeddings == 128


def test_a_keyword_that_the_template_never_reads(folder):
    message = refusal(path=str(folder), chat_template_kwargs={"thinkin": False})
    assert message.startswith(
        "model.chat_template_kwargs.thinkin: the chat template never reads it; check its spelling"
    )
    load_policy(PretrainedConfig(path=str(folder), chat_template_kwargs={"thinking": False}))


def test_a_date_that_the_template_never_reads(folder):
    assert "model.template_date: the chat template never reads the clock" in refusal(
        path=str(folder), template_date="2024-07-26"
    )


def test_a_reference_needs_no_template(folder):
    (folder / "chat_template.jinja").unlink()
    chat = PretrainedConfig(path=str(folder), chat=True)
    assert load_frozen(chat).tokenizer.chat_template is None
    with pytest.raises(ConfigError, match="model.chat=true: the tokenizer has no chat template"):
        load_policy(chat)


def test_the_id_that_pads():
    tokenizer = character_tokenizer()
    assert pad_token_id(tokenizer) == 0
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == 2
    tokenizer.eos_token = None
    assert pad_token_id(tokenizer) == 0


def test_a_template_with_a_clock_fits_a_date():
    tokenizer = character_tokenizer(template=DATED)
    check_tokenizer(tokenizer, small_model(len(tokenizer)), ModelConfig(template_date="2024-07-26"))


def test_a_tokenizer_class_that_knows_only_unknown(tmp_path):
    """Some kinds give their unknown token for every character where the files are missing."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="^here: .*copy tokenizer.json and tokenizer_config.json"):
        load_tokenizer(str(tmp_path), "here")
