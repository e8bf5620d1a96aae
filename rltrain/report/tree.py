"""The prefix tree of a group as rows to draw, one per run of tokens that the same completions share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from rltrain.advantages.prefix_tree import common_prefixes, prefix_values


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Tokens ``start:stop`` of the completions ``members``. ``value`` is the mean of their rewards, NaN if all abstain.

    ``level`` counts the splits above. All members of a leaf end with these tokens.
    """

    level: int
    start: int
    stop: int
    members: tuple[int, ...]
    value: float
    leaf: bool


def branches(completion_ids: Sequence[Sequence[int]], rewards: Sequence[float | None] | Tensor) -> list[Branch]:
    """The branches of a group, depth first, children in the order of their first completion."""
    if not completion_ids:
        return []
    common = common_prefixes(completion_ids).tolist()
    values = [row.tolist() for row in prefix_values(completion_ids, rewards)]

    def grow(members: tuple[int, ...], start: int, level: int) -> Iterator[Branch]:
        first = members[0]
        stop = min(common[first][member] for member in members)
        children: dict[int | None, list[int]] = {}
        for index in members:
            ids = completion_ids[index]
            children.setdefault(ids[stop] if len(ids) > stop else None, []).append(index)
        leaf = set(children) == {None}
        value = next((values[i][stop] for i in members if values[i][stop] == values[i][stop]), float("nan"))
        yield Branch(level=level, start=start, stop=stop, members=members, value=value, leaf=leaf)
        if not leaf:
            for child in children.values():
                yield from grow(tuple(child), stop, level + 1)

    return list(grow(tuple(range(len(completion_ids))), 0, 0))
