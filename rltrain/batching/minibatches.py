"""Which groups of a rollout make which optimiser step (``batch.minibatches``)."""

from __future__ import annotations

import hashlib
import itertools

from rltrain.runtime import dist


def split(groups: int, minibatches: int, *, seed: int, step: int) -> list[list[int]]:
    """Indices of this rank's groups in each minibatch; all ranks call this together.

    The groups of all ranks, in rank order, are put into an order that is a pure function of (seed, step) and cut into
    ``minibatches`` runs whose sizes differ by one at most. Which groups make a minibatch does not depend on how many
    ranks there are, as long as the prompts of a step lie on them in order: dynamic sampling replaces some, and the
    order then depends on the number of ranks. One minibatch keeps the order as it is.
    """
    if minibatches == 1:
        return [list(range(groups))]
    counts = dist.gather_objects(groups, name="groups of every rank")
    first, total = sum(counts[: dist.rank()]), sum(counts)
    shuffled = sorted(range(total), key=lambda index: _key(seed, step, index))
    bounds = [total * part // minibatches for part in range(minibatches + 1)]
    return [
        [index - first for index in sorted(shuffled[start:stop]) if first <= index < first + groups]
        for start, stop in itertools.pairwise(bounds)
    ]


def _key(seed: int, step: int, index: int) -> bytes:
    return hashlib.blake2b(f"minibatch/{seed:d}/{step:d}/{index:d}".encode(), digest_size=8).digest()
