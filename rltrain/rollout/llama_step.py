"""One decoding step of Llama-shaped models without transformers' per-step overhead: half the operations, same weights.

    x += O(attend(rope(norm_q(Q n(x))), rope(norm_k(K n(x))), V n(x)));   x += Down(act(Gate n(x)) * Up n(x))

Plain projections read the modules' weights where they lie, LoRA is merged into new ones (:mod:`~.merged_lora`), and all
others are called as modules. Q, K and V are one product: of small or merged weights a copy is stacked, and large ones
are where they lie end to end, as in the flat buffers of ZeRO 1 and 2. Rotations come from a table. A step reads nothing
from the device, so a CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from rltrain.engine.deepspeed import is_whole
from rltrain.rollout.merged_lora import merged_lora

MODEL_TYPES = ("llama", "qwen2", "qwen3")
_LENGTH_DEPENDENT = ("dynamic", "longrope")  # rope types of transformers
# See `linear_map`: rows of a weight in one matrix product, at most; the products of one batch, for each thread, so that
# the whole of a large result never exists twice; the least weight for which all that pays.
_BLOCK_ROWS = 2048
_BATCHED_BLOCKS = 2
_BLOCKED_ELEMENTS = 1 << 16
# Weights whose stack has fewer elements are copied: a megabyte, once a rollout.
_STACKED_ELEMENTS = 1 << 18

# (layer index, query [B, H, D], key [B, H_kv, D], value [B, H_kv, D], scale, window) -> [B, H·D]
Attend = Callable[[int, Tensor, Tensor, Tensor, float, int | None], Tensor]
Map = Callable[[Tensor], Tensor]


def _blocks(rows: int, threads: int) -> int:
    """The fewest equal blocks of at most ``_BLOCK_ROWS`` that every thread gets as many of; 1 if there are none."""
    fewest = -(-rows // _BLOCK_ROWS)
    return next((n for n in range(threads, rows // 64 + 1, threads) if n >= fewest and rows % n == 0), 1)


class _BlockProduct:
    """x_BD · W^T + b as batches of products with blocks of W's rows, W staying where it is.

    With ``keep`` a result of several batches lies where the last one did: fresh pages cost more than what fills them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, blocks: int, *, keep: bool) -> None:
        blocks_NDK = weight.view(blocks, -1, weight.shape[1]).mT
        self._batch = _BATCHED_BLOCKS * torch.get_num_threads()
        self._shape, self._parts = (blocks, blocks_NDK.shape[-1]), blocks_NDK.split(self._batch)
        self._bias, self._keep, self._kept = bias, keep, weight.new_empty(0)

    def __call__(self, x_BD: Tensor) -> Tensor:
        if len(self._parts) == 1:
            out_NBK = torch.bmm(x_BD.expand(self._shape[0], -1, -1), self._parts[0])
            out_BV = out_NBK.transpose(0, 1).reshape(len(x_BD), -1)
        else:
            out_BNK = self._memory(len(x_BD))
            for part, out in zip(self._parts, out_BNK.split(self._batch, dim=1), strict=True):
                out.copy_(torch.bmm(x_BD.expand(len(part), -1, -1), part).transpose(0, 1))
            out_BV = out_BNK.flatten(1)
        return out_BV if self._bias is None else out_BV.add_(self._bias)

    def _memory(self, rows: int) -> Tensor:
        if not self._keep:
            return self._parts[0].new_empty(rows, *self._shape)
        if len(self._kept) != rows:
            self._kept = self._kept.new_empty(rows, *self._shape)
        return self._kept


def linear_map(module: nn.Module, *, keep: bool = False) -> Map:
    """The module's own map, on a CPU by blocks where that is faster; ``keep`` allows it to overwrite its last result.

    A product of few rows x with a large W is shared badly among threads, and slow on one where W has very many rows
    (docs/rollout.md).
    """
    weights = _weights(module)
    return module if weights is None else _product(*weights, keep=keep)


def _weights(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a module that is x · W^T + b; None of others."""
    return (module.weight, module.bias) if _is_plain(module) else merged_lora(module)


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks


def _product(weight: Tensor, bias: Tensor | None, *, keep: bool = False) -> Map:
    """x -> x · W^T + b."""
    plain = weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() < _BLOCKED_ELEMENTS
    blocks = 1 if plain else _blocks(len(weight), torch.get_num_threads())
    if blocks == 1 or not weight.is_contiguous():
        weight_DN = weight.t()
        if bias is None:
            return lambda x_BD: torch.mm(x_BD, weight_DN)
        return lambda x_BD: torch.addmm(bias, x_BD, weight_DN)
    return _BlockProduct(weight, bias, blocks, keep=keep)


def stacked_map(modules: Sequence[nn.Module]) -> Map:
    """The maps' results side by side: one product where all are linear, and weights are small, adjacent or merged."""
    read = [_weights(module) for module in modules]
    linear = [weights for weights in read if weights is not None]
    biases = [bias for _, bias in linear if bias is not None]
    if len(linear) == len(modules) and len(biases) in (0, len(modules)):
        merged = not all(_is_plain(module) for module in modules)
        weight = _stacked([weight for weight, _ in linear], copies=merged)
        if weight is not None:
            return _product(weight, torch.cat([*biases]) if biases else None)
    maps = [module if it is None else _product(*it) for module, it in zip(modules, read, strict=True)]
    return lambda x_BD: torch.cat([apply(x_BD) for apply in maps], dim=-1)


def _stacked(weights: Sequence[Tensor], *, copies: bool = False) -> Tensor | None:
    """[sum of rows, D]: a view where weights lie end to end, a copy where small or with ``copies``, else None."""
    first, total = weights[0], sum(weight.numel() for weight in weights)
    ends = [weight.data_ptr() + weight.numel() * weight.element_size() for weight in weights]
    follows = all(end == weight.data_ptr() for end, weight in zip(ends, weights[1:], strict=False))
    together = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    if follows and together and all(weight.is_contiguous() for weight in weights):
        return first.as_strided((total // first.shape[1], first.shape[1]), (first.shape[1], 1))
    return torch.cat(list(weights)) if copies or total < _STACKED_ELEMENTS else None


def _rms_norm(weight: Tensor, eps: float) -> Map:
    """x / sqrt(mean x² + eps) · weight over the last axis; ``weight`` may have more axes, one norm for each."""
    size = weight.shape[-1]
    if weight.dtype != torch.float32:
        return lambda x: torch.rms_norm(x, (size,), None, eps) * weight
    eps_1 = torch.full((1,), eps, device=weight.device)

    def norm(x: Tensor) -> Tensor:
        # Half the operations of torch.rms_norm, which on a CPU is a composition.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.addcmul(eps_1, length, length, value=1 / size).rsqrt_()).mul_(weight)

    return norm


class _LayerStep:
    """One layer's step, its weights looked up once."""

    def __init__(self, index: int, layer: Any, attend: Attend) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._index, self._attend, self._act = index, attend, mlp.act_fn
        self._heads_map = stacked_map((attention.q_proj, attention.k_proj, attention.v_proj))
        self._out, self._gate, self._up, self._down = map(
            linear_map, (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )
        self._norm_1, self._norm_2 = map(_norm_of, (layer.input_layernorm, layer.post_attention_layernorm))
        self._head_size, self._scale = attention.head_dim, attention.scaling
        self._window = getattr(attention, "sliding_window", None)
        config = attention.config
        self._heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._turned = self._heads + kv_heads
        self._norm_heads: Map | None = None
        if hasattr(attention, "q_norm"):
            weights = [attention.q_norm.weight.expand(self._heads, -1), attention.k_norm.weight.expand(kv_heads, -1)]
            self._norm_heads = _rms_norm(torch.cat(weights), attention.q_norm.variance_epsilon)

    def __call__(self, x_BD: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        x_BD = x_BD + self._self_attention(self._norm_1(x_BD), cos, signed_sin)
        h_BD = self._norm_2(x_BD)
        return x_BD + self._down(self._act(self._gate(h_BD)).mul_(self._up(h_BD)))

    def _self_attention(self, h_BD: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        heads_BHD = self._heads_map(h_BD).view(len(h_BD), -1, self._head_size)
        both, value = heads_BHD[:, : self._turned], heads_BHD[:, self._turned :]
        if self._norm_heads is not None:
            both = self._norm_heads(both)
        both = torch.addcmul(both * cos, both.roll(self._head_size // 2, -1), signed_sin)
        query, key = both[:, : self._heads], both[:, self._heads :]
        return self._out(self._attend(self._index, query, key, value, self._scale, self._window))


def _norm_of(module: Any) -> Map:
    return _rms_norm(module.weight, module.variance_epsilon)


class LlamaStep:
    """Logits [B, V] of one token a row, good until the next call.

    Made anew for every rollout, since it holds the weights of the moment.
    """

    def __init__(self, model: Any, attend: Attend) -> None:
        backbone = model.model
        self._embed, self._rotary = backbone.embed_tokens, backbone.rotary_emb
        self._layers = [_LayerStep(index, layer, attend) for index, layer in enumerate(backbone.layers)]
        self._norm, self._head = _norm_of(backbone.norm), linear_map(model.lm_head, keep=True)
        # Rotations that depend on the length of the batch are computed at every step.
        self.tabulates = not any(kind in backbone.rotary_emb.rope_type for kind in _LENGTH_DEPENDENT)
        self._turns_P: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def supports(model: Any) -> bool:
        """Known architectures with whole weights: those that ZeRO 3 has sharded are gathered by hooks skipped here."""
        known = model.config.model_type in MODEL_TYPES and type(model).__module__.startswith("transformers.models.")
        return known and hasattr(model, "lm_head") and is_whole(model)

    def prepare(self, positions: int) -> None:
        """Tabulate the rotations of so many positions; must come before a step at any of them."""
        if self.tabulates and (self._turns_P is None or len(self._turns_P[0]) < positions):
            self._turns_P = self._turns(torch.arange(positions, device=self._embed.weight.device))

    def _turns(self, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin, both [B, 1, head size]: rotate_half(x)·sin = roll(x)·signed sin."""
        cos, sin = self._rotary(self._embed.weight, positions_B[:, None])
        half = sin.shape[-1] // 2
        return cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)

    def __call__(self, tokens_B: Tensor, positions_B: Tensor, last_B: Tensor | None = None) -> Tensor:
        """``last_B`` are the tokens whose logits are wanted; all without."""
        x_BD = self._embed(tokens_B)
        if self._turns_P is None:
            cos, signed_sin = self._turns(positions_B)
        else:
            cos, signed_sin = (turns.index_select(0, positions_B) for turns in self._turns_P)
        for layer in self._layers:
            x_BD = layer(x_BD, cos, signed_sin)
        return self._head(self._norm(x_BD if last_B is None else x_BD[last_B]))
