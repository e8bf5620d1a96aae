"""Which layouts of micro-batches a run may use: configured, supported by its models, and verified at the start."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from rltrain.batching.bins import LAYOUTS, Layout
from rltrain.batching.collate import NO_WEIGHTING, LossRow, Unit, token_batch
from rltrain.policy.logprobs import inference, logprobs, to_device, unwrapped
from rltrain.runtime import dist

log = logging.getLogger(__name__)


def usable_layouts(packing: str, models: Sequence[Any]) -> tuple[Layout, ...]:
    """The layouts of ``batch.packing`` in which all ``models`` give the log-probs of padded rows, at least ``padded``.

    ``models`` are :class:`~rltrain.policy.logprobs.LogprobModel` or engines that hold one. All ranks call this
    together.
    """
    configured: list[Layout] = [layout for layout in LAYOUTS if packing in ("auto", layout)]
    usable: list[Layout] = [layout for layout in configured if all(_works(layout, model, packing) for model in models)]
    return tuple(usable) or ("padded",)


def _works(layout: Layout, model: Any, packing: str) -> bool:
    if layout == "padded":
        return True
    module = unwrapped(model)
    name = type(module.model).__name__
    if module.cannot_pack is not None:
        level = logging.INFO if packing == "auto" else logging.WARNING
        log.log(level, "batch.packing=%s: layout %s is not used, %s: %s", packing, layout, name, module.cannot_pack)
        return False
    difference, limit = difference_from_padded(model, layout), torch.finfo(module.model.dtype).eps ** 0.5
    if difference <= limit:
        return True
    log.warning(
        "batch.packing=%s: in layout %s the log-probs of %s are %.2g nats from those of padded rows, more than %.2g; "
        "this layout is not used",
        *(packing, layout, name, difference, limit),
    )
    return False


@torch.no_grad()
def difference_from_padded(model: Any, layout: Layout) -> float:
    """Mean absolute difference of the log-probs of a small batch in this layout and as padded rows, in nats.

    The largest over ranks. It should be below half the digits of the model's precision.
    """
    module = unwrapped(model)
    units = check_units(module.model.config.get_text_config().vocab_size)
    alone: list[Unit] = [(row,) for unit in units for row in unit]
    batches = (token_batch(units if layout == "shared" else alone, NO_WEIGHTING, layout),)
    batches += (token_batch(alone, NO_WEIGHTING, "padded"),)
    with inference(module):
        in_layout, padded = (logprobs(model, to_device(batch, dist.device()), entropy=False) for batch in batches)
    difference = (in_layout.logprobs_N - padded.logprobs_N).abs().mean().nan_to_num(torch.inf)
    return float(dist.all_max(difference.cpu(), name="check of the packed layout"))


def check_units(vocabulary: int) -> list[Unit]:
    """Two prompts with three completions each, of unequal lengths."""

    def ids(first: int, length: int) -> tuple[int, ...]:
        return tuple((37 * (first + i) + 11) % vocabulary for i in range(length))

    return [
        tuple(
            LossRow(
                prompt_ids=ids(seed, prompt),
                completion_ids=ids(seed + 100 * (index + 1), length),
                sampler_logprobs=(0.0,) * length,
                advantages_T=torch.zeros(length),
            )
            for index, length in enumerate((6, 1, 9))
        )
        for seed, prompt in ((0, 5), (50, 11))
    ]
