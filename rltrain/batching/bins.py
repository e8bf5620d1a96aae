"""How sequences become micro-batches: bins under a token budget, equal work for ranks, and what a layout costs.

Integers only. A segment ``(own, prefix)`` is a run of ``own`` tokens that attend to themselves and to the ``prefix``
tokens before them, which are another segment's. Work is counted per layer in pairs of a query and a key, 4D FLOP each:

    6D·tokens + pairs + 10·gathered vectors + CALL_FLOP/4D · calls of attention
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal

Layout = Literal["padded", "packed", "shared"]
LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared")
Segment = tuple[int, int]

CALL_FLOP = 4_000_000
"""What a call of attention costs beside its arithmetic: about 0.1 ms of a core that does 40 GFLOP/s."""
GATHER_PAIRS = 10
"""Copying a token's vector into a row and its gradient back: 40·D FLOP at a core's memory bandwidth."""


def call_pairs(hidden_size: int) -> float:
    """``CALL_FLOP`` as pairs."""
    return CALL_FLOP / (4 * hidden_size)


def padded_bins(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices into bins, longest first; a bin whose rows are padded to its longest holds at most ``budget`` tokens.

    Padding counts, so that the budget bounds memory; sorted lengths keep it small. Ties keep their order.
    """
    order, bins = sorted(range(len(lengths)), key=lambda i: -lengths[i]), []
    while order:
        rows = budget // fitting(lengths[order[0]], budget)
        bins.append(order[:rows])
        order = order[rows:]
    return bins


def first_fit_decreasing(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices into bins of at most ``budget``: largest first, each into the first bin with room. Ties keep order."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = fitting(sizes[index], budget)
        place = next((place for place, free in enumerate(room) if free >= size), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(budget)
        bins[place].append(index)
        room[place] -= size
    return bins


def fitting(size: int, budget: int) -> int:
    """``size``, or ValueError if it exceeds ``budget``."""
    if size > budget:
        raise ValueError(f"a sequence of {size} tokens exceeds batch.token_budget={budget}; raise the budget")
    return size


def karmarkar_karp(work: Sequence[float], parts: int) -> list[list[int]]:
    """Indices into ``parts`` sets of nearly equal sums, by largest differencing (Karmarkar and Karp, 1982).

    The two partial partitions that are the most uneven are merged, heavy sets with light ones, until one is left.
    """
    none: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * (parts - 1)
    heap: list[Any] = [(-one, index, [*none, (one, (index,))]) for index, one in enumerate(work)]
    heapq.heapify(heap)
    while len(heap) > 1:
        _, tie, uneven = heapq.heappop(heap)
        _, _, other = heapq.heappop(heap)
        pairs = zip(uneven, reversed(other), strict=True)
        merged = sorted((a_sum + b_sum, a + b) for (a_sum, a), (b_sum, b) in pairs)
        heapq.heappush(heap, (merged[0][0] - merged[-1][0], tie, merged))
    return [sorted(indices) for _, indices in heap[0][2]] if heap else [[] for _ in range(parts)]


def attention_calls(segments: Sequence[Segment], hidden_size: int) -> list[list[int]]:
    """Indices of segments that share a call of attention: of one prefix length, which makes one mask do for all.

    Longest first; a row that would waste more pairs on padding than a call costs starts a new call.
    """
    order = sorted((i for i, (own, _) in enumerate(segments) if own), key=lambda i: (segments[i][1], -segments[i][0]))
    calls: list[list[int]] = []
    for prefix, same in groupby(order, key=lambda i: segments[i][1]):
        calls.append([])
        wasted = 0
        for index in same:
            own = segments[index][0]
            longest = segments[calls[-1][0]][0] if calls[-1] else own
            wasted += longest * (longest + prefix) - own * (own + prefix)
            if wasted > call_pairs(hidden_size):
                calls.append([])
                wasted = 0
            calls[-1].append(index)
    return calls


def packed_work(segments: Sequence[Segment], hidden_size: int) -> float:
    """Work of a packed micro-batch. Attention without a prefix skips the half that is masked."""
    work = 6.0 * hidden_size * sum(own for own, _ in segments)
    for call in attention_calls(segments, hidden_size):
        own, prefix = segments[call[0]]
        pairs = own * (own + prefix) if prefix else own * own / 2
        vectors = 2 * own + 2 * (own + prefix)
        work += len(call) * (pairs + GATHER_PAIRS * vectors) + call_pairs(hidden_size)
    return work


def padded_work(lengths: Sequence[int], hidden_size: int) -> float:
    """Work of a micro-batch of rows that are padded to the longest; nothing is gathered."""
    rows, longest = len(lengths), max(lengths)
    return rows * (6 * hidden_size * longest + longest * longest / 2) + call_pairs(hidden_size)


def equal_shares(work: Sequence[float], owner: Sequence[int], parts: int) -> list[int]:
    """The part that each item goes to: the sets of :func:`karmarkar_karp`, named so that much stays where it is."""
    target, free = [0] * len(work), set(range(parts))
    for indices in karmarkar_karp(work, parts):
        held = {part: sum(work[i] for i in indices if owner[i] == part) for part in sorted(free)}
        part = max(held, key=held.__getitem__)
        free.remove(part)
        for index in indices:
            target[index] = part
    return target
