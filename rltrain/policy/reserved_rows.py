"""Rows of the vocabulary that are no tokens: chosen, appended where the model lacks them, and masked in the head.

The mask is a bias of -inf in the output head, a buffer that no file holds. Every softmax over the logits leaves the
rows out: sampling, log-probs, entropies. The grid is read from the head's weights instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rltrain.errors import require
from rltrain.policy.capabilities import head_bias, logit_softcap
from rltrain.policy.head import is_plain
from rltrain.runtime.introspection import IntrospectionConfig

KEY = "model.introspection"


def reserve_rows(model: Any, tokenizer: Any, config: IntrospectionConfig) -> None:
    """Take the grid's rows, append those that the model lacks, mask them. ``ConfigError`` where that cannot be."""
    ids = sorted(tokenizer.get_vocab().values())
    first = ids[-1] + 1 if config.first_row is None else config.first_row
    stop = first + config.cells
    used = [token for token in ids if first <= token < stop]
    require(
        not used,
        f"{KEY}.first_row={first}: the tokenizer uses {len(used)} of the rows {first}..{stop - 1}, the first is "
        f"{used[0] if used else first}; leave {KEY}.first_row out, or set it above {ids[-1]}",
    )
    saved = saved_rows(model, tokenizer)
    require(
        saved in ([], list(range(first, stop))),
        f"{KEY}: the model was saved with {len(saved)} reserved rows from {min(saved, default=0)}, and the grid takes "
        f"{config.cells} from {first}; set {KEY}.lengths and {KEY}.rewards as in the run that trained it",
    )
    head = model.get_output_embeddings()
    require(is_plain(head), f"{KEY}.head=true: the model's output head is not a plain linear map; choose another model")
    require(head_bias(head) is None, f"{KEY}.head=true: the model's output head has a bias; choose another model")
    require(
        logit_softcap(model.config.get_text_config()) is None,
        f"{KEY}.head=true: the model caps its logits, and a capped mask masks nothing; choose another model",
    )
    rows = len(head.weight)
    if stop > rows:
        _append(model, first, stop, rows, config)
    _mask(model.get_output_embeddings(), first, stop)
    model.generation_config.suppress_tokens = list(range(first, stop))  # for transformers' own generate


def saved_rows(model: Any, tokenizer: Any) -> list[int]:
    """The rows that a saved model's generation config keeps from being sampled and that are no tokens."""
    tokens = set(tokenizer.get_vocab().values())
    return [row for row in model.generation_config.suppress_tokens or [] if row not in tokens]


def refuse_unmasked(model: Any, tokenizer: Any) -> None:
    """``ConfigError`` for a model that was saved with reserved rows: without the mask they are sampled as tokens."""
    rows = saved_rows(model, tokenizer)
    require(
        not rows,
        f"{KEY}.head=false: the model was saved with {len(rows)} reserved rows from {min(rows, default=0)}, which "
        f"would be sampled as tokens; set {KEY}.head=true, with lengths and rewards as in the run that trained it",
    )


def _append(model: Any, first: int, stop: int, rows: int, config: IntrospectionConfig) -> None:
    """New rows of zeros, in both embeddings."""
    require(
        config.append_rows and first <= rows,
        f"{KEY}: the grid takes {config.cells} rows from {first}, and the model has {rows}; use fewer bins, or set "
        f"{KEY}.append_rows=true and leave {KEY}.first_row out",
    )
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(stop, mean_resizing=False)
    with torch.no_grad():
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            embedding.weight[rows:] = 0.0


def _mask(head: nn.Linear, first: int, stop: int) -> None:
    mask_V = torch.zeros(len(head.weight), dtype=head.weight.dtype, device=head.weight.device)
    mask_V[first:stop] = -torch.inf
    del head._parameters["bias"]
    head.register_buffer("bias", mask_V, persistent=False)


def reserved_rows(model: Any) -> slice | None:
    """The masked rows of a model's head, None where there are none."""
    mask_V = model.get_output_embeddings()._buffers.get("bias")
    if mask_V is None:
        return None
    places = mask_V.isneginf().nonzero().flatten()
    return slice(int(places[0]), int(places[-1]) + 1)
