"""The weights and optimiser state that a rank holds, by parameter name, at every ZeRO stage, and their files.

A shard is a run of elements of a flattened parameter, with its fp32 weight and AdamW's moments. Its tensors are views
of DeepSpeed's, so that writing into a shard restores it. The elements that a rank holds:

    stage 0      every rank every parameter; rank r writes the parameters r, r + ranks, …
    stage 1, 2   parameters are laid end to end and cut into one piece per rank
    stage 3      each parameter is cut into one piece per rank; the last ones are padded

A file names its elements, not their owner, so that a run of any stage and number of ranks can read what it needs.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rltrain.errors import RunError
from rltrain.runtime import dist

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
BYTES_PER_ELEMENT = 4 * (1 + len(MOMENTS))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Elements from ``start`` on of the flattened parameter ``name``. ``tensors`` are the weight and the moments."""

    name: str
    start: int
    tensors: Mapping[str, Tensor]
    step: Tensor

    @property
    def size(self) -> int:
        return self.tensors[WEIGHT].numel()


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A shard in a file."""

    start: int
    size: int
    step: float
    file: Any


def held(parameters: Iterable[tuple[str, Any]], *, stage: int, optimizer: Any, base: Any) -> list[Shard]:
    """The shards of the trainable ``parameters`` on this rank.

    ``optimizer`` is DeepSpeed's, ``base`` the AdamW inside it. State that AdamW makes in its first step is made here.
    """
    trainable = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    places = {0: _whole, 1: _laid_end_to_end, 2: _laid_end_to_end, 3: _cut_each}[stage](trainable, optimizer, base)
    shards = []
    for name, start, master, offset, size in places:
        state = base.state[master]
        if not state:
            state["step"] = torch.tensor(0.0)
            state.update({moment: torch.zeros_like(master) for moment in MOMENTS})
        whole = {WEIGHT: master, **{moment: state[moment] for moment in MOMENTS}}
        tensors = {key: value.detach().view(-1).narrow(0, offset, size) for key, value in whole.items()}
        shards.append(Shard(name=name, start=start, tensors=tensors, step=state["step"]))
    return shards


def full_shape(parameter: Any) -> torch.Size:
    """The shape of a whole parameter, of which ZeRO 3 leaves an empty tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)


# Each yields (name, first element of the parameter, the tensor that AdamW steps, offset of that element in it, length).
_Places = Iterator[tuple[str, int, Tensor, int, int]]


def _whole(trainable: list[tuple[str, Any]], optimizer: Any, base: Any) -> _Places:
    masters = {id(parameter): parameter for _, parameter in trainable}
    if optimizer is not base:  # bf16: AdamW steps fp32 copies
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            masters |= {id(parameter): master for parameter, master in zip(low, high, strict=True)}
    for name, parameter in trainable:
        yield name, 0, masters[id(parameter)], 0, parameter.numel()


def _laid_end_to_end(trainable: list[tuple[str, Any]], optimizer: Any, base: Any) -> _Places:
    for name, parameter in trainable:
        link = parameter._hp_mapping
        if link is not None:
            (flat,) = base.param_groups[link.param_group_index]["params"]
            inside, outside = link.lp_fragment_address, link.hp_fragment_address
            yield name, inside.start, flat, outside.start, inside.numel


def _cut_each(trainable: list[tuple[str, Any]], optimizer: Any, base: Any) -> _Places:
    for name, parameter in trainable:
        group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = padded * optimizer._get_param_partition_rank(parameter)
        size = min(padded, parameter.ds_numel - start)
        if size > 0:
            yield name, start, optimizer.fp32_partitioned_groups_flat[group], offset, size


def publish(parameters: Iterable[tuple[str, Any]], shards: Iterable[Shard], *, stage: int, optimizer: Any) -> None:
    """Put the fp32 weights into the model, in its own precision. All ranks call this together."""
    if stage in (1, 2):
        optimizer.update_lp_params()
        return
    by_name = dict(parameters)
    if stage == 0:
        for shard in shards:
            weight = by_name[shard.name].detach().view(-1)
            if weight.data_ptr() != shard.tensors[WEIGHT].data_ptr():
                weight.copy_(shard.tensors[WEIGHT])
        return
    kept_whole = optimizer.persistent_parameters
    if kept_whole:
        kept_whole[0].partition(kept_whole)
    for shard in shards:
        by_name[shard.name].ds_tensor.detach()[: shard.size].copy_(shard.tensors[WEIGHT])
    optimizer.checkpoint_event_epilogue()  # gathers what is kept whole on every rank


def write(folder: Path, shards: list[Shard], *, replicated: bool) -> Path:
    """Write this rank's file into ``folder``. Of ``replicated`` shards, each rank writes every ranks-th."""
    written = shards[dist.rank() :: dist.world_size()] if replicated else shards
    tensors = {f"{key}/{shard.name}": value for shard in written for key, value in shard.tensors.items()}
    entries = {shard.name: {"start": shard.start, "step": float(shard.step)} for shard in written}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{dist.rank():05d}.safetensors"
    save_file(tensors, path, metadata={"shards": json.dumps(entries)})
    return path


class Archive:
    """The files of a folder, read element by element, under any stage and number of ranks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pieces: dict[str, list[_Piece]] = defaultdict(list)
        for path in sorted(folder.glob("rank_*.safetensors")):
            file = safe_open(path, framework="pt")
            for name, entry in json.loads(file.metadata()["shards"]).items():
                size = file.get_slice(f"{WEIGHT}/{name}").get_shape()[0]
                self._pieces[name].append(_Piece(start=entry["start"], size=size, step=entry["step"], file=file))

    def names(self) -> list[str]:
        """The parameters in the files."""
        return sorted(self._pieces)

    def weight(self, name: str) -> Tensor:
        """The whole fp32 weight of a parameter, flattened."""
        size = sum(piece.size for piece in self._pieces[name])
        shard = Shard(name=name, start=0, tensors={WEIGHT: torch.empty(size)}, step=torch.tensor(0.0))
        self.restore([shard])
        return shard.tensors[WEIGHT]

    def restore(self, shards: Iterable[Shard]) -> None:
        """Fill the shards with their saved elements. RunError if an element is in no file."""
        for shard in shards:
            copied = sum(self._copy(piece, shard) for piece in self._pieces[shard.name])
            if copied != shard.size:
                raise RunError(
                    f"{self._folder}: holds {copied} of the {shard.size} elements of {shard.name} that rank "
                    f"{dist.rank()} needs, so it is of another model; set another run_dir"
                )

    def _copy(self, piece: _Piece, shard: Shard) -> int:
        low, high = max(piece.start, shard.start), min(piece.start + piece.size, shard.start + shard.size)
        if low >= high:
            return 0
        for key, tensor in shard.tensors.items():
            saved = piece.file.get_slice(f"{key}/{shard.name}")[low - piece.start : high - piece.start]
            tensor[low - shard.start : high - shard.start].copy_(saved)
        # Parameters laid end to end share a step counter, and the saved counters of parameters never stepped are lower.
        shard.step.fill_(max(float(shard.step), piece.step))
        return high - low
