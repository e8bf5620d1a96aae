"""LoRA adapters merged into new tensors for the length of a rollout (2106.09685, section 4.1).

    W' = W + sum over active adapters of scale · B A     scale = alpha / r, or alpha / sqrt(r) with rsLoRA (2312.03732)

The sum is in fp32 and rounded to the precision of W. No weight of the model changes. Dropout is not applied, as in
evaluation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def merged_lora(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """W' and bias of a LoRA layer of peft, whose weights must be whole.

    None if the module is another, or is more than this formula: DoRA and other variants, biases of adapters, adapters
    that are off or merged already, hooks.
    """
    if not hasattr(module, "base_layer"):
        return None
    from peft.tuners import lora

    if type(module) is not lora.Linear or not _is_formula(module):
        return None
    layer: Any = module
    base = layer.base_layer
    weight = base.weight.detach().float()
    for adapter in _adapters(layer):
        low, high = (factors[adapter].weight.detach().float() for factors in (layer.lora_A, layer.lora_B))
        weight = torch.addmm(weight, high, low, alpha=layer.scaling[adapter])
    return weight.to(base.weight.dtype), base.bias


def _adapters(layer: Any) -> list[str]:
    return [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


def _is_formula(layer: Any) -> bool:
    plain = type(layer.base_layer) is nn.Linear and not layer.merged and not layer.disable_adapters
    hooked = any(inner._forward_hooks or inner._forward_pre_hooks for inner in layer.modules())
    adapters = _adapters(layer)
    varied = any(adapter in layer.lora_variant or layer.lora_bias[adapter] for adapter in adapters)
    return bool(adapters) and plain and not hooked and not varied
