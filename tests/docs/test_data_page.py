"""The page on data names every key, and its messages are those of the code."""

import dataclasses
from pathlib import Path

import pytest

from rltrain.config import ModelConfig
from rltrain.data.hub import HubConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text()
PROMPT_KEYS = {"chat", "system", "examples", "chat_template_kwargs", "template_date"}


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(HubConfig)])
def test_every_key_of_hub_is_named(key):
    assert f"`data.{key}`" in PAGE


def test_every_key_of_prompts_is_named():
    assert {field.name for field in dataclasses.fields(ModelConfig)} >= PROMPT_KEYS
    assert [key for key in sorted(PROMPT_KEYS) if f"`model.{key}`" not in PAGE] == []


@pytest.mark.parametrize(
    "words",
    [
        "is a list, not text (",
        "not a finite number",
        "holds half a character (a lone surrogate)",
        "is none of the row's options",
        "has no content",
        "ends with the assistant, whose text would stand in the prompt (",
        "the chat template refuses its messages (",
        "so that the gold would stand in the prompt; take it out ",
        "no tokenizer, ",
        "the file is empty (0 bytes)",
        "no such file or folder; give a file, a folder or a hub name",
    ],
)
def test_the_messages_in_the_table_are_those_of_the_code(words):
    sources = [*(ROOT / "rltrain" / "data").glob("*.py"), *(ROOT / "rltrain" / "policy").glob("*.py")]
    assert words in PAGE
    assert any(words in path.read_text() for path in sources)
