"""The policy's weights on their way to vLLM: one tensor at a time, also where ZeRO 3 shards them."""

from __future__ import annotations

import copy
import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rltrain.errors import ConfigError
from rltrain.runtime import dist

FILE_BYTES = 4 * 2**30


def checkpoint_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its name in a transformers folder, LoRA merged into it; all ranks iterate together.

    A weight is whole while the next one has not been asked for, and may be kept.
    """
    base = _base(model)
    if getattr(base, "_weight_conversions", None):
        raise ConfigError(
            f"{type(base).__name__}: its weights are laid out differently in memory and in a folder, which cannot be "
            "pushed one by one yet; set rollout=local"
        )
    seen: set[int] = set()
    adapted: list[str] = []
    for path, module in base.named_modules():
        if any(path.startswith(prefix) for prefix in adapted):
            continue
        if hasattr(module, "base_layer"):
            adapted.append(f"{path}.")
            yield from _merged(path, module)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:  # tied weights are one
                seen.add(id(parameter))
                with _gathered([parameter]):
                    yield f"{path}.{name}".lstrip("."), parameter.detach()


def _merged(path: str, layer: Any) -> Iterator[tuple[str, Tensor]]:
    """``W + sum over adapters of scale · B A`` of a LoRA layer of peft."""
    with _gathered(list(layer.parameters())), torch.no_grad():
        weight = layer.base_layer.weight.detach()
        for adapter in layer.active_adapters:
            weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
        yield f"{path}.weight", weight
        if layer.base_layer.bias is not None:
            yield f"{path}.bias", layer.base_layer.bias.detach()


def _gathered(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Makes whole what ZeRO 3 shards, unless it is whole already: leaving the block would shard it again."""
    sharded: list[Any] = [one for one in parameters if hasattr(one, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    apart = [one for one in sharded if one.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    return deepspeed.zero.GatheredParameters(apart, enabled=bool(apart))


def describe(policy: Any, folder: Path) -> None:
    """What vLLM reads of a model beside its weights: config and tokenizer."""
    base = _base(policy.model)
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__]  # missing in a model made in code
    config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def _base(model: Any) -> Any:
    """The model inside peft's wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class WeightFolder:
    """Weights on storage that trainer and servers share; each version is a folder with a name of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._run = uuid.uuid4().hex[:8]  # a server may still hold the weights of an earlier start of this run
        self._count = 0

    def write(self, model: Any) -> Path:
        """The folder of a new version, written by rank 0; all ranks call this together and get the same answer."""
        path = self._folder / f"{self._run}_{self._count:06d}"
        self._count += 1
        weights = checkpoint_weights(model)
        if dist.is_main():
            path.mkdir(parents=True)
            write_files(path, weights)
        else:
            for _ in weights:
                pass
        return dist.gather_objects(path, name="weights for the vLLM servers")[0]

    def keep_only(self, path: Path) -> None:
        """Delete every other version; rank 0 calls this once no server will be asked to read them."""
        for other in self._folder.iterdir():
            if other.is_dir() and other != path:
                shutil.rmtree(other, ignore_errors=True)


def write_files(folder: Path, weights: Iterator[tuple[str, Tensor]], *, file_bytes: int = FILE_BYTES) -> None:
    """Safetensors files of about ``file_bytes`` with transformers' index, so that no more than that is in memory."""
    from safetensors.torch import save_file

    places: dict[str, str] = {}
    held: dict[str, Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(held, folder / name)
        places.update(dict.fromkeys(held, name))
        held.clear()

    for name, tensor in weights:
        if held and sum(one.nbytes for one in held.values()) + tensor.nbytes > file_bytes:
            flush()
        held[name] = tensor.to("cpu", copy=True).contiguous()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
