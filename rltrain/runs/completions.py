"""Completions as JSON and two flat tensors, for files of a run: step dumps, and batches sampled ahead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any, TypeVar

import torch
from torch import Tensor

from rltrain.types import Completion, Turn, among_observed, written_mask

T = TypeVar("T")


def facts_of(completion: Completion) -> dict[str, Any]:
    """All but token ids and log-probs, for JSON."""
    facts = {"tokens": len(completion.token_ids), "finish": completion.finish, "text": completion.text}
    if completion.entropies is not None:
        facts["entropies"] = completion.entropies
    if completion.turns:
        facts["turns"] = [vars(turn) for turn in completion.turns]
    if completion.failed or completion.abstains:
        facts |= {"failed": completion.failed, "abstains": completion.abstains}
    return facts


def flat_ids(completions: Sequence[Completion], dtype: torch.dtype) -> Tensor:
    """The token ids of all completions, one after the other."""
    return torch.tensor([token for completion in completions for token in completion.token_ids], dtype=dtype)


def flat_logprobs(completions: Sequence[Completion], dtype: torch.dtype) -> Tensor:
    """The sampled log-probs of all completions, one after the other."""
    return torch.tensor([value for completion in completions for value in completion.logprobs], dtype=dtype)


def restored(facts: Sequence[Mapping[str, Any]], ids: Tensor, logprobs: Tensor) -> list[Completion]:
    """The completions of :func:`facts_of`, :func:`flat_ids` and :func:`flat_logprobs`."""
    sizes = [fact["tokens"] for fact in facts]
    return [
        _completion(fact, ids_T.tolist(), logprobs_T.tolist())
        for fact, ids_T, logprobs_T in zip(facts, ids.split(sizes), logprobs.split(sizes), strict=True)
    ]


def _completion(fact: Mapping[str, Any], ids: Sequence[int], logprobs: Sequence[float]) -> Completion:
    turns = tuple(Turn(**turn) for turn in fact.get("turns", ()))
    entropies = [(entropy, collision) for entropy, collision in fact["entropies"]] if "entropies" in fact else None
    return Completion(
        token_ids=tuple(ids),
        logprobs=_as_made(logprobs, turns, math.nan),
        finish=fact["finish"],
        text=fact["text"],
        entropies=None if entropies is None else _as_made(entropies, turns, (math.nan, math.nan)),
        turns=turns,
        failed=fact.get("failed", ""),
        abstains=fact.get("abstains", False),
    )


def _as_made(values: Sequence[T], turns: Sequence[Turn], missing: T) -> tuple[T, ...]:
    """The values with the very NaN of :mod:`math` at observed ids, so that records compare equal."""
    if not turns:
        return tuple(values)
    return among_observed(list(compress(values, written_mask(turns))), turns, missing)
