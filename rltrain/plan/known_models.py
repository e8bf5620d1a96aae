"""The numbers of ``config.json`` of the models that presets name, so that they are planned without a network.

Sources: the models' cards on the hub, Qwen/Qwen3-0.6B and Qwen/Qwen3-8B.
"""

from __future__ import annotations

from typing import Any

_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
}
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B": _QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}


def known_architecture(name: str) -> Any | None:
    """The transformers config of a model in the table, else None."""
    from transformers import AutoConfig

    numbers = KNOWN_MODELS.get(name)
    if numbers is None:
        return None
    rest = {key: value for key, value in numbers.items() if key != "model_type"}
    return AutoConfig.for_model(numbers["model_type"], **rest)
