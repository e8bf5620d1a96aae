"""Which problems a step takes: a pure function of (seed, step), so that there is no state to save or replay."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

from rltrain.errors import require

FEISTEL_ROUNDS = 6


def _round_keys(*parts: int) -> list[int]:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(FEISTEL_ROUNDS)]


def _scrambled(value: int, key: int) -> int:
    x = ((value ^ key) * 0xBF58476D1CE4E5B9) & (1 << 64) - 1
    x = ((x ^ (x >> 29)) * 0x94D049BB133111EB) & (1 << 64) - 1
    return x ^ (x >> 32)


class Permutation:
    """A keyed permutation of ``range(size)`` whose every image costs O(1) time and memory.

    A Feistel network over the smallest square of a power of two that holds ``size``; an image outside the range is
    mapped again until it falls inside (cycle walking), at most 4 times on average.
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self.half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self.keys = _round_keys(size, *key)

    def __getitem__(self, position: int) -> int:
        image = self._network(position)
        while image >= self.size:
            image = self._network(image)
        return image

    def _network(self, value: int) -> int:
        mask = (1 << self.half_bits) - 1
        left, right = value >> self.half_bits, value & mask
        for key in self.keys:
            left, right = right, left ^ (_scrambled(right, key) & mask)
        return left << self.half_bits | right


def epochs(size: int, start: int, count: int, *key: int) -> Iterator[int]:
    """``count`` entries from position ``start`` of the concatenation of one permutation per epoch."""
    permutation, current = None, -1
    for position in range(start, start + count):
        if permutation is None or position // size != current:
            current = position // size
            permutation = Permutation(size, *key, current)
        yield permutation[position % size]


def replacements(size: int, taken: set[int], *key: int) -> Iterator[int]:
    """An endless stream that starts with every problem that is not taken, each once."""
    yield from (index for index in epochs(size, 0, size, *key, 0) if index not in taken)
    for cycle in range(1, 1 << 62):
        yield from epochs(size, 0, size, *key, cycle)


def problem_indices(size: int, count: int, *, seed: int, step: int, attempt: int = 0) -> list[int]:
    """The ``count`` problems of a step, out of ``size``; O(count) at any step.

    Step s takes positions [s·count, (s+1)·count) of the concatenation of one keyed permutation per epoch: every problem
    once per epoch, none skipped at its end. A step that crosses the end of an epoch may hold a problem twice.

    ``attempt`` a > 0 gives the a-th replacement batch of the same step (dynamic sampling): other problems than those of
    attempts 0..a-1, as long as size >= (a+1)·count. It leaves the order of later steps alone.
    """
    require(size >= 1, "data: the data set is empty; nothing to sample from")
    require(count >= 1, f"count={count}: a step needs at least 1 problem")
    require(step >= 0 and attempt >= 0, f"step={step}, attempt={attempt}: must be >= 0")
    regular = list(epochs(size, step * count, count, seed))
    if attempt == 0:
        return regular
    others = replacements(size, set(regular), seed, step)
    drawn = [next(others) for _ in range(attempt * count)]
    return drawn[-count:]


def occurrences(size: int, count: int, *, seed: int, step: int, attempt: int = 0) -> list[int]:
    """For each of :func:`problem_indices`, how often the step drew that problem before, in this attempt and earlier."""
    return times_before(
        [problem_indices(size, count, seed=seed, step=step, attempt=each) for each in range(attempt + 1)]
    )


def times_before(drawn: Sequence[Sequence[Hashable]]) -> list[int]:
    """For each of the last batch, how often it stands before itself in that batch and the earlier ones."""
    times: Counter[Hashable] = Counter()
    before = []
    for place in itertools.chain.from_iterable(drawn):
        before.append(times[place])
        times[place] += 1
    return before[len(before) - len(drawn[-1]) :]
