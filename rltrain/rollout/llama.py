"""One decoding step of Llama-shaped models without transformers' per-step overhead: half the operations, same weights.

    x += O(attend(rope(norm_q(Q n(x))), rope(norm_k(K n(x))), V n(x)));   x += Down(act(Gate n(x)) * Up n(x))

Projections are called as the model's own modules, so LoRA layers and biases take part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MODEL_TYPES = ("llama", "qwen2", "qwen3")

# (layer index, query [B, H, D], key [B, H_kv, D], value [B, H_kv, D], scale, window) -> [B, H·D]
Attend = Callable[[int, Tensor, Tensor, Tensor, float, int | None], Tensor]


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return torch.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


class LlamaStep:
    """Logits [B, V] of one token a row."""

    def __init__(self, model: Any, attend: Attend) -> None:
        self._backbone, self._head, self._attend = model.model, model.lm_head, attend

    @staticmethod
    def supports(model: Any) -> bool:
        """Known architectures with whole weights: under ZeRO-3 they are gathered by hooks of modules skipped here."""
        known = model.config.model_type in _MODEL_TYPES and type(model).__module__.startswith("transformers.models.")
        sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        return known and hasattr(model, "lm_head") and not sharded

    def __call__(self, tokens_B: Tensor, positions_B: Tensor) -> Tensor:
        x_BD = self._backbone.embed_tokens(tokens_B)
        cos, sin = self._backbone.rotary_emb(x_BD, positions_B[:, None])
        half = sin.shape[-1] // 2
        # rotate_half(x) * sin = roll(x) * signed_sin
        rope = (cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1))
        for index, layer in enumerate(self._backbone.layers):
            x_BD = x_BD + self._self_attention(index, layer.self_attn, _rms_norm(layer.input_layernorm, x_BD), rope)
            h_BD = _rms_norm(layer.post_attention_layernorm, x_BD)
            mlp = layer.mlp
            x_BD = x_BD + mlp.down_proj(mlp.act_fn(mlp.gate_proj(h_BD)).mul_(mlp.up_proj(h_BD)))
        return self._head(_rms_norm(self._backbone.norm, x_BD))

    def _self_attention(self, index: int, attention: Any, h_BD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        shape = (h_BD.shape[0], -1, attention.head_dim)
        query, key = attention.q_proj(h_BD).view(shape), attention.k_proj(h_BD).view(shape)
        if hasattr(attention, "q_norm"):
            query, key = _rms_norm(attention.q_norm, query), _rms_norm(attention.k_norm, key)
        cos, signed_sin = rope
        heads = query.shape[1]
        both = torch.cat([query, key], dim=1)
        both = torch.addcmul(both * cos, both.roll(attention.head_dim // 2, -1), signed_sin)
        value = attention.v_proj(h_BD).view(shape)
        window = getattr(attention, "sliding_window", None)
        out = self._attend(index, both[:, :heads], both[:, heads:], value, attention.scaling, window)
        return attention.o_proj(out)
