"""What an architecture of transformers can do, and facts that its config may or may not state.

A transformers config has the attributes of its architecture alone, so optional ones are read here, with the default
that their absence means, and nowhere else. ``config`` is ``model.config.get_text_config()`` throughout.
"""

from __future__ import annotations

import inspect
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_kinds(config: Any) -> frozenset[str]:
    """The kinds of the layers, ``full_attention`` alone where the config names none."""
    return frozenset(getattr(config, "layer_types", None) or [FULL])


def with_layers(config: Any, count: int) -> None:
    """Cut the architecture to its first ``count`` layers, in place."""
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]


def intermediate_size(config: Any) -> int:
    """The width of the MLP, four times the hidden size where the config does not give it (GPT-2)."""
    return getattr(config, "intermediate_size", None) or 4 * config.hidden_size


def kv_heads(config: Any) -> int:
    """Heads of keys and values, as many as of queries without grouped-query attention."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_size(config: Any) -> int:
    """The width of a head, D / H where the config does not give it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def most_positions(config: Any) -> int | None:
    """The number of positions, None if the config gives none or the architecture adds a bias to scores instead.

    A factor of the rotations counts, although some configs include it in their number.
    """
    known = getattr(config, "max_position_embeddings", None)
    if not known or known < 0 or getattr(config, "alibi", False):
        return None
    rotations = getattr(config, "rope_parameters", None) or {}
    by_layer = [rotations, *(layer for layer in rotations.values() if isinstance(layer, dict))]
    return int(known * max(float(layer.get("factor") or 1) for layer in by_layer))


def head_bias(head: Any) -> Any:
    """The bias [V] of an output head, None if it has none."""
    return getattr(head, "bias", None)


def logit_scale(config: Any) -> float:
    """The factor of the logits: multipliers (Cohere, Falcon-H1) over a divisor (Granite); None means 1 (MPT)."""
    cohere, falcon, granite = (
        1.0 if getattr(config, name, None) is None else float(getattr(config, name))
        for name in ("logit_scale", "lm_head_multiplier", "logits_scaling")
    )
    return cohere * falcon / granite


def logit_softcap(config: Any) -> float | None:
    """c of the soft cap ``c·tanh(u/c)`` of the logits (Gemma), None without a cap."""
    return getattr(config, "final_logit_softcapping", None)


def cannot_share_prompts(model: Any) -> str | None:
    """Why completions cannot attend to the keys and values of a prompt that is forwarded once. None if they can."""
    config = model.config.get_text_config()
    kinds = layer_kinds(config)
    return _first_that_holds(
        {
            "its attention is not dispatched by transformers": not getattr(model, "_supports_attention_backend", False),
            f"it has layers of kinds {sorted(kinds)}": not kinds <= {FULL, SLIDING},
            "its layers share keys and values": bool(getattr(config, "num_kv_shared_layers", 0)),
            "it attends through latent keys": hasattr(config, "kv_lora_rank"),
            "it has attention sinks": any(name.endswith("sinks") for name, _ in model.named_parameters()),
        }
    )


def cannot_pack(model: Any) -> str | None:
    """Why sequences that lie end to end cannot be attended apart from one another. None if they can."""
    config = model.config.get_text_config()
    return cannot_share_prompts(model) or _first_that_holds(
        {
            "it takes no positions": "position_ids" not in inspect.signature(model.get_decoder().forward).parameters,
            "it is not causal": bool(getattr(config, "use_bidirectional_attention", False)),
        }
    )


def _first_that_holds(reasons: dict[str, bool]) -> str | None:
    return next((reason for reason, holds in reasons.items() if holds), None)
