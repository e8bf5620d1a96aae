"""The parameters of a model and the memory of its forward and backward, from its config alone, without its weights.

Activations are counted, not modelled. The decoder runs under torch's fake tensors, which have sizes and lifetimes but
no memory: a storage is added when it is made and subtracted when it is freed. This holds for any architecture of
transformers, with adapters and gradient checkpointing.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rltrain.config import ModelConfig
from rltrain.errors import ConfigError
from rltrain.plan.known_models import known_architecture
from rltrain.policy import capabilities
from rltrain.policy.load import PretrainedConfig, located
from rltrain.policy.lora import add_lora
from rltrain.policy.tiny import TinyConfig, tiny_architecture
from rltrain.rollout.llama_step import MODEL_TYPES, LlamaStep

FP32_BYTES = 4
# Two counts of layers, from which the cost of one more follows. Models with fewer layers are run whole.
PROBED_LAYERS = (2, 4)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Counts of a model's elements, unless the name says otherwise. ``dtype_bytes`` is the size of a weight.

    ``tied``: the head is the embedding matrix. ``graphs``: ``rollout=local`` decodes it by CUDA graphs on a GPU.
    ``decode_copies``: elements of the weights that it makes for that, merged LoRA and stacks of small Q, K and V.
    """

    trainable: int
    frozen: int
    largest: int
    vocabulary: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype_bytes: int
    tied: bool
    graphs: bool = False
    decode_copies: int = 0

    @property
    def parameters(self) -> int:
        return self.trainable + self.frozen

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of ``tokens``: ``2 · L · H_kv · d · bytes`` each."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes * tokens


def architecture(config: ModelConfig) -> Any:
    """The transformers config of a model source, without reading its weights."""
    from transformers import AutoConfig

    if isinstance(config, TinyConfig):
        return tiny_architecture(config) if config.path is None else AutoConfig.from_pretrained(config.path)
    if not isinstance(config, PretrainedConfig):
        raise ConfigError(
            f"model: {type(config).__name__} has no transformers config to plan with; choose another model"
        )
    if known := known_architecture(config.path):
        return known
    source = located(config)
    gguf = {"gguf_file": config.gguf_file} if config.gguf_file else {}
    try:
        return AutoConfig.from_pretrained(
            source, trust_remote_code=config.trust_remote_code, revision=config.revision or "main", **gguf
        )
    except OSError as error:
        cause = str(error).splitlines()[0]
        raise ConfigError(
            f"model.path={config.path}: no config.json can be read ({cause}); give a folder that holds one, or a hub "
            "name this machine can reach"
        ) from error


def build(config: ModelConfig, shape: Any, *, device: str) -> Any:
    """The model on ``device`` ("meta", or any under fake tensors), with adapters and checkpointing as configured."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.dtype))
    if config.lora.rank > 0:
        with torch.device("meta"):  # elsewhere peft moves new adapters by Module.to, which fake tensors refuse
            model = add_lora(model, config.lora)
        _settle(model, device=device, dtype=getattr(torch, config.dtype))
    return model.train()


def _settle(model: Any, *, device: str, dtype: torch.dtype) -> None:
    """Give adapters that were made on the meta device memory on ``device``, in the precision that they train in."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta and weight.requires_grad:
                there = torch.empty_like(weight, device=device, dtype=dtype)
                setattr(module, name, torch.nn.Parameter(there))


def measure(config: ModelConfig, shape: Any) -> ModelShape:
    """Count the parameters of the model on the meta device."""
    model = build(config, shape, device="meta")
    text = shape.get_text_config()
    parameters = list(model.parameters())
    return ModelShape(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        frozen=sum(p.numel() for p in parameters if not p.requires_grad),
        largest=max(p.numel() for p in parameters if p.requires_grad),
        vocabulary=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=capabilities.intermediate_size(text),
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=capabilities.kv_heads(text),
        head_dim=capabilities.head_size(text),
        dtype_bytes=getattr(torch, config.dtype).itemsize,
        tied=bool(shape.tie_word_embeddings),
        graphs=shape.model_type in MODEL_TYPES,
        decode_copies=decode_copies(model),
    )


def decode_copies(model: Any) -> int:
    """Elements of the new weights that a rollout's :class:`~rltrain.rollout.llama_step.LlamaStep` holds; 0 without it.

    Counted as activations are: the step is made of the model, which may lie on the meta device.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not LlamaStep.supports(base):
        return 0
    with PeakBytes() as counted:
        step = LlamaStep(base, _no_attention)
        live = counted.live
    del step
    return live // base.dtype.itemsize


def _no_attention(*_: Any) -> torch.Tensor:
    raise NotImplementedError


class PeakBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are not yet freed: ``live`` now, ``peak`` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # A view, and a result written in place, share the storage of an argument.
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in given and storage not in self._known:
                    self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        size = storage.nbytes()
        self._known.add(storage)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def activation_bytes(config: ModelConfig, shape: Any, *, rows: int, tokens: int, checkpointing: bool) -> int:
    """Peak memory of forward and backward of ``rows x tokens`` through the decoder, without weights and gradients."""
    layers = shape.get_text_config().num_hidden_layers
    if layers <= PROBED_LAYERS[-1]:
        return _probe(config, shape, rows=rows, tokens=tokens, checkpointing=checkpointing)
    few, more = (
        _probe(config, with_depth(shape, count), rows=rows, tokens=tokens, checkpointing=checkpointing)
        for count in PROBED_LAYERS
    )
    per_layer = (more - few) / (PROBED_LAYERS[1] - PROBED_LAYERS[0])
    return round(more + per_layer * (layers - PROBED_LAYERS[1]))


def with_depth(shape: Any, count: int) -> Any:
    """The transformers config with ``count`` layers."""
    cut = copy.deepcopy(shape)
    capabilities.with_layers(cut.get_text_config(), count)
    return cut


def _probe(config: ModelConfig, shape: Any, *, rows: int, tokens: int, checkpointing: bool) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), _quiet():
        model = build(config, shape, device="cpu")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        ids_BT = torch.zeros(rows, tokens, dtype=torch.long)
        with PeakBytes() as counted:
            hidden_BTD = model.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state
            hidden_BTD.backward(torch.ones_like(hidden_BTD))
    return counted.peak


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
