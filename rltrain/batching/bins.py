"""How sequences become micro-batches: bins under a token budget, equal work for ranks, and the work of a layout.

Integers only. A segment ``(length, prefix)`` is ``length`` tokens that attend to one another and to the ``prefix``
tokens of another segment before them. Work is counted per layer in pairs of a query and a key, 4D FLOP each:

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
"""The overhead of a call of attention: about 0.1 ms of a core that does 40 GFLOP/s."""
GATHER_PAIRS = 10
"""Copying a token's vector into a row and its gradient back: 40·D FLOP at a core's memory bandwidth."""


def call_pairs(hidden_size: int) -> float:
    """``CALL_FLOP`` as pairs."""
    return CALL_FLOP / (4 * hidden_size)


def padded_bins(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices into bins, longest first. A bin whose rows are padded to its longest holds at most ``budget`` tokens.

    Padding counts, so that the budget bounds memory. Sorting keeps padding small. Ties keep their order.
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

    Of the partial partitions, the two most uneven are merged, heavy sets with light ones, until a single one is left.
    """
    empty: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * (parts - 1)
    heap: list[Any] = [(-value, index, [*empty, (value, (index,))]) for index, value in enumerate(work)]
    heapq.heapify(heap)
    while len(heap) > 1:
        _, tie, uneven = heapq.heappop(heap)
        _, _, next_uneven = heapq.heappop(heap)
        pairs = zip(uneven, reversed(next_uneven), strict=True)
        merged = sorted((a_sum + b_sum, a + b) for (a_sum, a), (b_sum, b) in pairs)
        heapq.heappush(heap, (merged[0][0] - merged[-1][0], tie, merged))
    return [sorted(indices) for _, indices in heap[0][2]] if heap else [[] for _ in range(parts)]


def attention_calls(segments: Sequence[Segment], hidden_size: int) -> list[list[int]]:
    """Indices of segments that share a call of attention: of equal prefix length, so that they share a mask.

    Longest first. A new call starts where padding would cost more pairs than a call.
    """
    order = sorted(
        (i for i, (length, _) in enumerate(segments) if length), key=lambda i: (segments[i][1], -segments[i][0])
    )
    calls: list[list[int]] = []
    for prefix, same in groupby(order, key=lambda i: segments[i][1]):
        calls.append([])
        wasted = 0
        for index in same:
            length = segments[index][0]
            longest = segments[calls[-1][0]][0] if calls[-1] else length
            wasted += longest * (longest + prefix) - length * (length + prefix)
            if wasted > call_pairs(hidden_size):
                calls.append([])
                wasted = 0
            calls[-1].append(index)
    return calls


def packed_work(segments: Sequence[Segment], hidden_size: int) -> float:
    """Work of a packed micro-batch. Attention without a prefix skips the half that is masked."""
    work = 6.0 * hidden_size * sum(length for length, _ in segments)
    for call in attention_calls(segments, hidden_size):
        length, prefix = segments[call[0]]
        pairs = length * (length + prefix) if prefix else length * length / 2
        vectors = 2 * length + 2 * (length + prefix)
        work += len(call) * (pairs + GATHER_PAIRS * vectors) + call_pairs(hidden_size)
    return work


def padded_work(lengths: Sequence[int], hidden_size: int) -> float:
    """Work of a micro-batch of rows that are padded to the longest. Nothing is gathered."""
    rows, longest = len(lengths), max(lengths)
    return rows * (6 * hidden_size * longest + longest * longest / 2) + call_pairs(hidden_size)


def equal_shares(work: Sequence[float], owner: Sequence[int], parts: int) -> list[int]:
    """The part that each item goes to: the sets of :func:`karmarkar_karp`, numbered so that most items stay."""
    target, free = [0] * len(work), set(range(parts))
    for indices in karmarkar_karp(work, parts):
        held = {part: sum(work[i] for i in indices if owner[i] == part) for part in sorted(free)}
        part = max(held, key=held.__getitem__)
        free.remove(part)
        for index in indices:
            target[index] = part
    return target
