"""Completions as JSON and two flat tensors, for files of a run: step dumps, and batches sampled ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rltrain.types import Completion


def facts_of(completion: Completion) -> dict[str, Any]:
    """All but token ids and log-probs, for JSON."""
    facts = {"tokens": len(completion.token_ids), "finish": completion.finish, "text": completion.text}
    return facts if completion.entropies is None else facts | {"entropies": completion.entropies}


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
        Completion(
            token_ids=tuple(ids_T.tolist()),
            logprobs=tuple(logprobs_T.tolist()),
            finish=fact["finish"],
            text=fact["text"],
            entropies=tuple((entropy, collision) for entropy, collision in fact["entropies"])
            if "entropies" in fact
            else None,
        )
        for fact, ids_T, logprobs_T in zip(facts, ids.split(sizes), logprobs.split(sizes), strict=True)
    ]
