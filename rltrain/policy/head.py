"""From a decoder's last states to logits: by the head's weights, or through the model's own forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rltrain.policy.capabilities import head_bias, logit_scale, logit_softcap
from rltrain.policy.packed_attention import gather


def is_plain(head: Any) -> bool:
    """Whether the head is its weights alone: a linear map without adapters (LoRA) and without a forward of its own."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward


def head_options(model: Any, temperature: float, *, entropy: bool) -> dict[str, Any]:
    """What the kernels take beside the weights of a plain head."""
    config = model.config.get_text_config()
    return {
        "temperature": temperature / logit_scale(config),
        "entropy": entropy,
        "bias_V": head_bias(model.get_output_embeddings()),
        "softcap": logit_softcap(config),
    }


def own_logits(model: Any, inputs: dict[str, Any], place_N: Tensor) -> Tensor:
    """The model's own logits [N, V] behind the states at ``place_N`` of the flat rows.

    The decoder's states are cut before the head sees them, so that no other logits exist, unless the model's forward
    takes another way. Adapters on the head, multipliers and caps of any kind take part.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    cuts: list[bool] = []

    def cut(module: Any, args: Any, output: Any) -> Any:
        if not cuts and hasattr(output, "last_hidden_state"):
            cuts.append(True)
            output.last_hidden_state = gather(output.last_hidden_state.flatten(0, 1), place_N)[None]
        return output

    handle = base.get_decoder().register_forward_hook(cut)
    try:
        logits_NV = base(**{"use_cache": False} | inputs).logits.flatten(0, 1)
    finally:
        handle.remove()
    return logits_NV if cuts else gather(logits_NV, place_N)
