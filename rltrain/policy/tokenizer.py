"""A tokenizer: what it puts before a text, and whether it fits the model and the keys that need it."""

from __future__ import annotations

import functools
import re
import string
from typing import Any

from rltrain.config import ModelConfig
from rltrain.errors import ConfigError, require

CLOCK = "strftime_now"  # what chat templates call for the time


def text_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The ids of a text to go on from: what the tokenizer begins texts with, once, and nothing at the end."""
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = start_ids(tokenizer)
    return ids if ids[: len(start)] == start else start + ids


@functools.lru_cache(maxsize=8)
def start_ids(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before every text, such as BOS."""
    for probe in string.printable:
        ids = tokenizer(probe, add_special_tokens=False)["input_ids"]
        whole = tokenizer(probe)["input_ids"]
        places = range(len(whole) - len(ids) + 1) if ids else ()
        for place in places:
            if whole[place : place + len(ids)] == ids:
                return tuple(whole[:place])
    return ()


def pad_token_id(tokenizer: Any) -> int:
    """Padding, else EOS, else 0: padded places are masked, so that any token serves."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None), 0)


def load_tokenizer(source: str, key: str, **options: Any) -> Any:
    """The tokenizer of a folder or hub name; ConfigError in one line where its files are missing or broken."""
    from transformers import AutoTokenizer

    remedy = "copy tokenizer.json and tokenizer_config.json of the base model into the folder"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # each kind of tokenizer fails in its own way
        cause = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"{key}: the tokenizer cannot be loaded ({type(error).__name__}: {cause}); {remedy}"
        ) from error
    # Without files transformers makes an empty one of the model's kind.
    known = set(tokenizer(string.printable, add_special_tokens=False)["input_ids"]) - set(tokenizer.all_special_ids)
    require(bool(known), f"{key}: no tokenizer, it has no token for any letter or digit; {remedy}")
    return tokenizer


def check_tokenizer(tokenizer: Any, model: Any, config: ModelConfig) -> None:
    """Every id has an embedding, and there is a chat template for the keys that need it."""
    tokens, rows = max(tokenizer.get_vocab().values()) + 1, model.get_input_embeddings().num_embeddings
    require(
        tokens <= rows,
        f"model: the tokenizer has {tokens} tokens, the model embeddings for {rows}; take the model's own tokenizer, "
        "or save the model after resize_token_embeddings",
    )
    template = tokenizer.chat_template
    require(
        template is not None or not config.chat,
        "model.chat=true: the tokenizer has no chat template; set model.chat=false",
    )
    text = str(template or "")
    for name in config.chat_template_kwargs:
        require(
            re.search(rf"\b{re.escape(name)}\b", text) is not None,
            f"model.chat_template_kwargs.{name}: the chat template never reads it; check its spelling, or take it out",
        )
    require(
        config.template_date is None or CLOCK in text,
        "model.template_date: the chat template never reads the clock; take it out",
    )
