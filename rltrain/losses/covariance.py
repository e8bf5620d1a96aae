"""Tokens by the covariance of advantage and log-prob, selected once a minibatch over all ranks (2505.22617).

The paper's code selects anew in every micro-batch, from the policy as it is then. Here the selection is made before the
first update of a minibatch, from the log-probs before it, so that it depends on no micro-batch, epoch or rank.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rltrain.runtime import dist
from rltrain.types import TokenBatch

Candidate = tuple[float, int, int, int]  # what is smallest first, the token's key, its micro-batch, its place there


def covariances(batches: Sequence[TokenBatch]) -> tuple[list[Tensor], int]:
    """(A - mean A)·(log pi_old - mean log pi_old) by micro-batch, NaN at weight 0, and N; means over all N tokens."""
    pairs = [(batch.advantages_N.double(), _old(batch).double(), batch.weights_N > 0) for batch in batches]
    sums = [torch.stack([a[real].sum(), p[real].sum(), real.sum()]) for a, p, real in pairs]
    advantages, logprobs, count = dist.all_sum(torch.stack(sums).sum(0).cpu(), name="means of a minibatch").tolist()
    most = max(count, 1.0)
    found = [((a - advantages / most) * (p - logprobs / most)).where(real, torch.nan) for a, p, real in pairs]
    return found, round(count)


def _old(batch: TokenBatch) -> Tensor:
    assert batch.old_logprobs_N is not None, "a loss that selects tokens needs the log-probs before the update"
    return batch.old_logprobs_N


def count_of(share: float, tokens: int) -> int:
    """How many tokens a share is: rounded down, but at least 1."""
    return max(1, int(share * tokens))


def drawn_within(
    batches: Sequence[TokenBatch], *, low: float, high: float, share: float, name: str
) -> list[TokenBatch]:
    """``selected_N``: ``share`` of all tokens, drawn from those with ``low`` < covariance < ``high``."""
    values, tokens = covariances(batches)
    candidates = [
        (_uniform(name, key), key, index, place)
        for index, value_N in enumerate(values)
        for key, place in _places(batches[index], (value_N > low) & (value_N < high))
    ]
    return _selected(batches, candidates, count_of(share, tokens))


def largest(batches: Sequence[TokenBatch], *, share: float) -> list[TokenBatch]:
    """``selected_N``: the ``share`` of all tokens of the largest covariance."""
    values, tokens = covariances(batches)
    count = count_of(share, tokens)
    candidates = []
    for index, value_N in enumerate(values):
        few = min(count, int((~value_N.isnan()).sum()))
        least = value_N.nan_to_num(nan=-torch.inf).topk(few).values[-1] if few else torch.inf
        candidates += [(-float(value_N[n]), key, index, n) for key, n in _places(batches[index], value_N >= least)]
    return _selected(batches, candidates, count)


def _places(batch: TokenBatch, wanted_N: Tensor) -> list[tuple[int, int]]:
    """Key and place of the tokens."""
    assert batch.keys_N is not None, "a loss that selects tokens needs TokenBatch.keys_N"
    places = wanted_N.nonzero().squeeze(1)
    return list(zip(batch.keys_N[places].tolist(), places.tolist(), strict=True))


def _uniform(name: str, key: int) -> float:
    """In [0, 1), a pure function of the minibatch's name and the token's key."""
    digest = hashlib.blake2b(f"{name}/{key:d}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _selected(batches: Sequence[TokenBatch], candidates: Sequence[Candidate], count: int) -> list[TokenBatch]:
    """Mark the ``count`` smallest candidates of all ranks."""
    here = heapq.nsmallest(count, candidates)
    ranks = dist.gather_objects([candidate[:2] for candidate in here], name="tokens that a loss selects")
    smallest = sorted(pair for pairs in ranks for pair in pairs)[:count]
    marks = [torch.zeros(len(batch.targets_N), dtype=torch.bool) for batch in batches]
    for value, key, index, place in here:
        marks[index][place] = (value, key) <= smallest[-1]
    return [
        replace(batch, selected_N=marks_N.to(batch.targets_N.device))
        for batch, marks_N in zip(batches, marks, strict=True)
    ]


def selection(batch: TokenBatch) -> Tensor:
    """``selected_N``; ValueError where nothing was selected."""
    if batch.selected_N is None:
        raise ValueError("TokenBatch.selected_N is missing; call config.loss.marked(batches, name) once a minibatch")
    return batch.selected_N
