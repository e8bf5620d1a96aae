"""What of a policy is in training mode: LoRA's own dropout, and the layers that are computed again in the backward.

Everything else stays in evaluation mode: the sampler draws without dropout, and log-probs with dropout would be those
of another policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint

from rltrain.errors import ConfigError


def only_lora_dropout(model: Any) -> None:
    """Evaluation mode, but for the dropout modules of LoRA adapters."""
    model.eval()
    for name, module in model.named_modules():
        if "lora_dropout" in name.split("."):
            module.training = True


def recompute_layers(model: Any) -> None:
    """Gradient checkpointing of every layer, without the dropout that transformers' training mode brings.

    transformers recomputes only layers in training mode. Here a layer is in training mode when it is called and in
    evaluation mode while it computes, so that dropout as a module, as a function and by the config is off.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"model.gradient_checkpointing=true: {type(model).__name__} has no layers that transformers can compute "
            "again; set model.gradient_checkpointing=false"
        )
    model.activation_checkpointing_enable()
    for layer in layers:
        layer._gradient_checkpointing_func = _as_evaluated(layer)
        layer.training = True


def _as_evaluated(layer: Any) -> Callable[..., Any]:
    def recompute(forward: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(run, forward, *args, use_reentrant=False)

    def run(forward: Callable[..., Any], *args: Any) -> Any:
        before, layer.training = layer.training, False
        try:
            return forward(*args)
        finally:
            layer.training = before

    return recompute
