"""How sequences become micro-batches: bins under a token budget, equal work for ranks, and the work of a layout.

Integers only. A segment ``(length, prefix)`` is ``length`` tokens that attend to one another and to the ``prefix``
tokens of another segment before them. Work is counted per layer in pairs of a query and a key, 4D FLOP each:

    6D·tokens + pairs + gather_pairs·gathered vectors + call_flop/4D · calls of attention

The last two factors are those of a kind of device (:class:`Costs`).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

Layout = Literal["padded", "packed", "shared"]
LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared")
Segment = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What attention costs beside its pairs, on a kind of device.

    ``call_flop`` is the overhead of a call. ``gather_pairs`` is copying a token's vector into a row and its gradient
    back. ``merges`` says that a row behind a prefix is two calls without a mask, so that the masked half is skipped.
    """

    call_flop: float
    gather_pairs: float
    merges: bool

    def call_pairs(self, hidden_size: int) -> float:
        """``call_flop`` as pairs."""
        return self.call_flop / (4 * hidden_size)


CPU = Costs(call_flop=4e6, gather_pairs=10, merges=False)
"""A core of 40 GFLOP/s: a call takes about 0.1 ms, and a vector 40·D FLOP at the core's memory bandwidth."""
CUDA = Costs(call_flop=4e9, gather_pairs=200, merges=True)
"""A GPU of 200 TFLOP/s and 2 TB/s in bf16: a call leaves it idle for about 20 us, and a vector moves 8·D bytes."""


def costs_of(device_type: str) -> Costs:
    """The costs on ``torch.device.type``; all but the CPU count as CUDA."""
    return CPU if device_type == "cpu" else CUDA


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


def attention_calls(segments: Sequence[Segment], hidden_size: int, costs: Costs = CPU) -> list[list[int]]:
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
            if wasted > costs.call_pairs(hidden_size):
                calls.append([])
                wasted = 0
            calls[-1].append(index)
    return calls


def packed_work(segments: Sequence[Segment], hidden_size: int, costs: Costs = CPU) -> float:
    """Work of a packed micro-batch. Attention skips the half that is masked where no mask tensor is needed.

    A row that is merged of two calls has two outputs, each as many vectors as the row.
    """
    work = 6.0 * hidden_size * sum(length for length, _ in segments)
    for call in attention_calls(segments, hidden_size, costs):
        length, prefix = segments[call[0]]
        merged = costs.merges and prefix > 0
        pairs = length * prefix + length * length / (2 if merged or not prefix else 1)
        vectors = 2 * length + 2 * (length + prefix) + (2 * length if merged else 0)
        calls = 2 if merged else 1
        work += len(call) * (pairs + costs.gather_pairs * vectors) + calls * costs.call_pairs(hidden_size)
    return work


def padded_work(lengths: Sequence[int], hidden_size: int, costs: Costs = CPU) -> float:
    """Work of a micro-batch of rows that are padded to the longest. Nothing is gathered."""
    rows, longest = len(lengths), max(lengths)
    return rows * (6 * hidden_size * longest + longest * longest / 2) + costs.call_pairs(hidden_size)


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
