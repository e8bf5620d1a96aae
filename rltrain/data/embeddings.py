"""Texts as vectors: the mean of a named model's last hidden states."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rltrain.errors import ConfigError
from rltrain.policy.capabilities import most_positions


@functools.lru_cache(maxsize=2)
def embedder(path: str, setting: str) -> Callable[[str], Tensor]:
    """The mean over a text's tokens of the last hidden states, scaled to length 1; (D,), float32.

    The model is loaded once, in fp32 on the CPU, so that a text's vector does not depend on where the run is. Texts are
    cut at the model's positions. ConfigError, under the name of ``setting``, for a model that cannot be loaded.
    """
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModel.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{setting}={path}: cannot be loaded ({cause}); give a folder of transformers") from None
    model.requires_grad_(False).eval()
    longest = most_positions(model.config)

    @functools.lru_cache(maxsize=4096)
    def embed(text: str) -> Tensor:
        ids = tokenizer(text)["input_ids"][:longest]
        with torch.no_grad():
            hidden_TD = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        return torch.nn.functional.normalize(hidden_TD.mean(0), dim=0)

    return embed
