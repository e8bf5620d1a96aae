"""The policy's weights on their way to vLLM: one tensor at a time, also where ZeRO 3 shards them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rltrain.engine.zero_shards import full_shape
from rltrain.errors import ConfigError
from rltrain.runtime import dist

FILE_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight as a transformers folder names it. ``whole()`` is its tensor while its ``parameters`` are gathered."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parameters: Sequence[nn.Parameter]
    whole: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def list_weights(model: Any) -> list[Weight]:
    """Every weight with its name, precision and shape, LoRA to be merged into it; nothing is gathered."""
    base = _base(model)
    if getattr(base, "_weight_conversions", None):
        raise ConfigError(
            f"{type(base).__name__}: its weights are laid out differently in memory and in a folder, which cannot be "
            "pushed one by one yet; set rollout=local"
        )
    seen: set[int] = set()
    adapted: list[str] = []
    found: list[Weight] = []
    for path, module in base.named_modules():
        if any(path.startswith(prefix) for prefix in adapted):
            continue
        if hasattr(module, "base_layer"):
            adapted.append(f"{path}.")
            found += _merged(path, module)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:  # tied weights are one
                seen.add(id(parameter))
                found.append(_plain(f"{path}.{name}".lstrip("."), parameter))
    return found


def checkpoint_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its name in a transformers folder, LoRA merged into it; all ranks iterate together.

    A weight is whole while the next one has not been asked for, and may be kept.
    """
    for weight in list_weights(model):
        with _gathered(weight.parameters), torch.no_grad():
            yield weight.name, weight.whole()


def _plain(name: str, parameter: nn.Parameter) -> Weight:
    shape = tuple(full_shape(parameter))
    return Weight(name=name, dtype=parameter.dtype, shape=shape, parameters=[parameter], whole=parameter.detach)


def _merged(path: str, layer: Any) -> list[Weight]:
    """``W + sum over adapters of scale · B A`` of a LoRA layer of peft, and its bias."""

    def whole() -> Tensor:
        weight = layer.base_layer.weight.detach()
        for adapter in layer.active_adapters:
            weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
        return weight

    base = layer.base_layer
    plain = _plain(f"{path}.weight", base.weight)
    merged = dataclasses.replace(plain, parameters=list(layer.parameters()), whole=whole)
    return [merged] if base.bias is None else [merged, _plain(f"{path}.bias", base.bias)]


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

    def next_version(self) -> Path:
        """Where the next version goes, whose name is the version's; the same on all ranks, which call this together."""
        path = self._folder / f"{self._run}_{self._count:06d}"
        self._count += 1
        return dist.gather_objects(path, name="weights for the vLLM servers")[0]

    def write(self, model: Any) -> Path:
        """The folder of a new version, each rank having written its files; all ranks call this together."""
        path = self.next_version()
        path.mkdir(parents=True, exist_ok=True)
        write_files(path, model)
        dist.barrier("files of weights for the vLLM servers")
        return path

    def keep_only(self, path: Path) -> None:
        """Delete every other version; rank 0 calls this once no server will be asked to read them."""
        for other in self._folder.iterdir():
            if other.is_dir() and other != path:
                shutil.rmtree(other, ignore_errors=True)


def in_files(weights: Sequence[Weight], *, ranks: int, file_bytes: int) -> list[list[Weight]]:
    """The weights of each file, in order: at most ``file_bytes`` or a single weight, and about a file a rank."""
    most = min(file_bytes, -(-sum(weight.nbytes for weight in weights) // ranks))
    files: list[list[Weight]] = [[]]
    for weight in weights:
        if files[-1] and sum(one.nbytes for one in files[-1]) + weight.nbytes > most:
            files.append([])
        files[-1].append(weight)
    return files


def write_files(folder: Path, model: Any, *, file_bytes: int = FILE_BYTES) -> None:
    """Safetensors files with transformers' index, shared out among the ranks; no rank holds more than a file at a time.

    File i is written by rank ``i mod R``. Under ZeRO 3 every rank takes part in gathering every weight.
    """
    from safetensors.torch import save_file

    rank, ranks = dist.rank(), dist.world_size()
    files = in_files(list_weights(model), ranks=ranks, file_bytes=file_bytes)
    names = [f"model-{index + 1:05d}.safetensors" for index in range(len(files))]
    whole = checkpoint_weights(model)
    for index, (name, file) in enumerate(zip(names, files, strict=True)):
        held = {}
        for _ in file:
            weight, tensor = next(whole)
            if index % ranks == rank:
                held[weight] = tensor.to("cpu", copy=True).contiguous()
        if held:
            save_file(held, folder / name)
    next(whole, None)  # leaves the block that holds the last weight whole
    if rank == 0:
        places = {weight.name: name for name, file in zip(names, files, strict=True) for weight in file}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
