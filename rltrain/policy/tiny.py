"""The built-in model: a Qwen3 architecture of about 1 M parameters with a character tokenizer, made in code."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rltrain.config import ModelConfig
from rltrain.errors import ConfigError, require
from rltrain.registry import register

TINY_ALPHABET = string.ascii_letters + string.digits + string.punctuation + " \n"


@dataclass(kw_only=True)
class TinyConfig(ModelConfig):
    """A Qwen3-architecture model with a character tokenizer, made in code: about 1 M parameters, no download.

    ``path`` names the folder of a saved model of this kind.
    """

    hidden_size: int = 128  # width of the model
    layers: int = 4  # its depth
    heads: int = 4  # attention heads; they divide hidden_size
    intermediate_size: int = 384  # width of the feed-forward layer
    max_positions: int = 512  # longest sequence, in tokens
    init_seed: int = 0  # of the initial weights
    path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.hidden_size % self.heads == 0,
            f"model.hidden_size={self.hidden_size} is not divisible by model.heads={self.heads}; change one of them",
        )


def character_tokenizer(alphabet: str = TINY_ALPHABET) -> Any:
    """One token per character, plus <pad>, <eos>, <unk>, <think> and </think>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>", "<think>", "</think>"]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    return tokenizer


def tiny_architecture(config: TinyConfig) -> Any:
    """The transformers config of the tiny model."""
    from transformers import Qwen3Config

    tokenizer = character_tokenizer()
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.hidden_size // config.heads,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


@register("model", "tiny", TinyConfig)
def tiny(config: TinyConfig) -> tuple[Any, Any]:
    """Build the tiny model with seeded random weights, or load it from ``config.path``."""
    from transformers import Qwen3ForCausalLM

    dtype = getattr(torch, config.dtype)
    tokenizer = character_tokenizer()
    if config.path is not None:
        if not Path(config.path).is_dir():
            raise ConfigError(f"model.path={config.path}: no such folder; give the folder of a saved tiny model")
        return Qwen3ForCausalLM.from_pretrained(config.path, dtype=dtype), tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.init_seed)
        model = Qwen3ForCausalLM(tiny_architecture(config))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.to(dtype), tokenizer
