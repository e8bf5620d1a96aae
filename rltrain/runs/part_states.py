"""``context.state``: tensors that estimators and rewards keep from step to step, saved and resumed with the run."""

from __future__ import annotations

import hashlib
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rltrain.errors import RunError
from rltrain.runtime import dist
from rltrain.types import State

PREFIX = "state/"


class PartState(UserDict[str, Tensor]):
    """The state of one part: tensors of any dtype, on the CPU and without gradient, by name."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part

    def __setitem__(self, name: str, value: Tensor) -> None:
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise RunError(
                f"{self._part}: context.state[{name!r}] = a {type(value).__name__}; give a tensor under a text, such "
                "as torch.tensor(…)"
            )
        super().__setitem__(name, value.detach().cpu())


class PartStates:
    """The states of all parts of a run, by part; ``kept`` are the tensors of the last finished step."""

    def __init__(self, saved: Mapping[str, Tensor] | None = None) -> None:
        """``saved`` are the tensors of a checkpoint, the ``kept`` ones of another run among others."""
        self._parts: dict[str, PartState] = {}
        for name, tensor in (saved or {}).items():
            if name.startswith(PREFIX):
                part, _, key = name.removeprefix(PREFIX).partition(":")
                self.of(part)[key] = tensor
        self.kept = self._tensors()

    def of(self, part: str) -> State:
        """The state of the part of this name, empty at first."""
        return self._parts.setdefault(part, PartState(part))

    def keep(self) -> None:
        """The states as they are now are those of a finished step. All ranks call this together.

        ``RunError`` on every rank for a tensor that is not the same bits on all.
        """
        self.kept = self._tensors()
        self._check_equal()

    def _tensors(self) -> dict[str, Tensor]:
        """Copies of all, by names that a checkpoint keeps."""
        named = {f"{PREFIX}{part}:{key}": each for part, state in self._parts.items() for key, each in state.items()}
        return {name: named[name].clone(memory_format=torch.contiguous_format) for name in sorted(named)}

    def _check_equal(self) -> None:
        digests = {name: digest(each) for name, each in self.kept.items()}
        refuse_difference(dist.gather_objects(digests, name="states of the parts"))


def copies(state_of: Callable[[str], State]) -> Callable[[str], State]:
    """States to use and forget: each call of a part gets a copy of its own."""

    def copy_of(part: str) -> State:
        copied = PartState(part)
        copied.update({key: each.clone() for key, each in state_of(part).items()})
        return copied

    return copy_of


def refuse_difference(ranks: Sequence[Mapping[str, str]]) -> None:
    """``RunError`` for the first tensor, by name, whose digests are not the same on all ranks."""
    for name in sorted(set().union(*ranks)):
        apart = [rank for rank, digests in enumerate(ranks) if digests.get(name) != ranks[0].get(name)]
        if apart:
            part, _, key = name.removeprefix(PREFIX).partition(":")
            raise RunError(
                f"{part}: context.state[{key!r}] of rank {apart[0]} differs from that of rank 0; sum over the ranks "
                "what goes into it, with rltrain.runtime.dist.all_sum"
            )


def digest(tensor: Tensor) -> str:
    """Of the dtype, the shape and the bits of a tensor on the CPU."""
    bits = tensor.flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + bits).hexdigest()
