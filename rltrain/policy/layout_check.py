"""Which layouts of a micro-batch a run may take: those that were asked for, that the models can, and that check out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rltrain.batching.bins import LAYOUTS, Layout
from rltrain.batching.collate import NO_WEIGHTING, Unit, token_batch
from rltrain.errors import ConfigError
from rltrain.policy.logprobs import logprobs, to_device, unwrapped
from rltrain.policy.model_check import Difference, check_units, difference, limit, own_logprobs, quiet, states
from rltrain.policy.reserved_rows import reserved_rows
from rltrain.runtime import dist

log = logging.getLogger(__name__)


def usable_layouts(packing: str, models: Sequence[Any]) -> tuple[Layout, ...]:
    """The layouts of ``batch.packing`` in which all ``models`` compute what transformers does; at least ``padded``.

    ``models`` are :class:`~rltrain.policy.logprobs.LogprobModel` or engines that hold one. All ranks call this
    together. Where a head is more than its weights, the model's own is used; ConfigError if even that is not enough.
    """
    if slow := slow_attention(dist.device().type, unwrapped(models[0]).model.dtype):
        log.warning(slow)
    configured: list[Layout] = [layout for layout in LAYOUTS if packing in ("auto", layout)]
    working = [_working(packing, configured, model) for model in models]
    usable: list[Layout] = [layout for layout in configured if all(layout in each for each in working)]
    return tuple(usable) or ("padded",)


def slow_attention(device_type: str, dtype: torch.dtype) -> str | None:
    """What to say of a dtype that no flash kernel takes, None where there is nothing to say."""
    if device_type != "cuda" or dtype.itemsize < 4:
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"model.dtype={name}: no flash attention on CUDA takes it, and tensor cores hardly help; set "
        "model.dtype=bfloat16"
    )


def _working(packing: str, configured: Sequence[Layout], model: Any) -> list[Layout]:
    module = unwrapped(model)
    name = type(module.model).__name__
    layouts: list[Layout] = ["padded", *(layout for layout in configured if layout != "padded")]
    if module.cannot_pack is not None and layouts[1:]:
        level = logging.INFO if packing == "auto" else logging.WARNING
        log.log(level, "batch.packing=%s: no layout but padded for %s: %s", packing, name, module.cannot_pack)
        layouts = ["padded"]
    apart = differences(model, layouts)
    if not apart["padded"].fits and not module.own_head:
        if reserved_rows(module.model) is not None:
            raise ConfigError(
                f"model.introspection.head=true: log-probs of {name} by the weights of its head, from which the grid "
                f"is read, are {apart['padded']}; choose another model"
            )
        log.warning(
            "log-probs of %s by the weights of its head are %s; the model's own head is used, which takes more memory",
            *(name, apart["padded"]),
        )
        module.own_head = True
        apart = differences(model, layouts)
    if not apart["padded"].fits:
        raise ConfigError(
            f"model: the trainer's log-probs of {name} are {apart['padded']}; this architecture cannot be trained "
            "here, choose another"
        )
    for layout in layouts:
        if not apart[layout].fits:
            log.warning(
                "batch.packing=%s: in layout %s the log-probs of %s are %s; this layout is not used",
                *(packing, layout, name, apart[layout]),
            )
    return [layout for layout in layouts if apart[layout].fits]


def differences(model: Any, layouts: Sequence[Layout]) -> dict[Layout, Difference]:
    """Of each layout, in the state of the adapters in which it is furthest off."""
    module = unwrapped(model)
    units = check_units(module.model)
    measured: dict[Layout, list[Difference]] = {layout: [] for layout in layouts}
    with quiet(module):
        for state in states(module.model):
            with state:
                own_N = own_logprobs(module.model, units)
                for layout in layouts:
                    for compute in _paths(model, units, layout):
                        measured[layout].append(difference(compute, own_N, limit(module.model, own_N)))
    return {layout: max(each, key=lambda path: path.nats / path.limit) for layout, each in measured.items()}


def _paths(model: Any, units: Sequence[Unit], layout: Layout) -> Iterator[Callable[[], Tensor]]:
    """Ways to the log-probs of the completions in a layout: the plain head and, on padded rows, the fused one."""
    module = unwrapped(model)
    rows = units if layout == "shared" else [(row,) for unit in units for row in unit]
    batch = to_device(token_batch(rows, NO_WEIGHTING, layout), dist.device())
    yield lambda: logprobs(model, batch, entropy=False, temperature=1.0).logprobs_N
    if layout == "padded" and not module.own_head:
        yield lambda: model(batch, entropy=False, temperature=1.0, token_loss=lambda logprobs_n, *_: logprobs_n)[0]
