"""Milliseconds per group of the prefix-tree values and advantages, beside a dictionary that walks the trie.

Both run in this process on one thread, medians of several rounds. Ids come as tensors; what reading lists of Python
ints adds is a column of its own. Rows: ``early`` differ from their first tokens on, ``near`` are copies of one
completion that differ in one token near the end, ``comb`` leave a common trunk one after another.

    python scripts/bench/prefix_tree.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rltrain.advantages.prefix_tree import common_prefixes, prefix_values
from rltrain.advantages.tempo import tempo_advantages

VOCABULARY = 150_000
SIZES = [(16, 1024), (16, 8192), (16, 32768), (4, 8192), (64, 8192), (128, 8192)]


def dictionary_values(completion_ids: Sequence[Sequence[int]], rewards: Sequence[float]) -> list[Tensor]:
    """The trie as a dictionary (node, token) -> child, with a sum and a count per node."""
    children: dict[tuple[int, int], int] = {}
    totals, counts = [0.0], [0]
    paths = []
    for ids, reward in zip(completion_ids, rewards, strict=True):
        node, path = 0, [0]
        for token in ids:
            node = children.setdefault((node, token), len(totals))
            if node == len(totals):
                totals.append(0.0)
                counts.append(0)
            path.append(node)
        for visited in path:
            totals[visited] += reward
            counts[visited] += 1
        paths.append(path)
    return [torch.tensor([totals[node] / counts[node] for node in path], dtype=torch.float64) for path in paths]


def rows_of(kind: str, size: int, length: int) -> Tensor:
    """Token ids, shape [G, L]."""
    generator = torch.Generator().manual_seed(0)
    ids_GL = torch.randint(VOCABULARY, (size, length), generator=generator)
    if kind == "early":
        return ids_GL
    trunk_GL = ids_GL[:1].repeat(size, 1)
    if kind == "near":
        trunk_GL[torch.arange(size), length - 1 - torch.arange(size) % 64] += 1 + torch.arange(size)
        return trunk_GL
    leaves_G = (torch.arange(size) + 1) * length // (size + 1)
    return torch.where(torch.arange(length) < leaves_G[:, None], trunk_GL, ids_GL)


def median_ms(function: Callable[[], Any], rounds: int) -> float:
    """Median wall time of one call."""
    times_s = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times_s.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times_s)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| rows | G | L | values, ms | advantages, ms | reading lists, ms | dictionary, ms | dictionary / values |")
    print("|---|---|---|---|---|---|---|---|")
    for size, length in SIZES:
        rewards = [float(i % 3 == 0) for i in range(size)]
        for kind in ("early", "near", "comb"):
            ids_GL = rows_of(kind, size, length)
            tensors, lists = list(ids_GL), ids_GL.tolist()
            for fast, slow in zip(prefix_values(tensors, rewards), dictionary_values(lists, rewards), strict=True):
                torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
            values_ms = median_ms(lambda ids=tensors, r=rewards: prefix_values(ids, r), rounds)
            advantages_ms = median_ms(lambda ids=tensors, r=rewards: tempo_advantages(ids, r), rounds)
            from_tensors_ms = median_ms(lambda ids=tensors: common_prefixes(ids), rounds)
            from_lists_ms = median_ms(lambda ids=lists: common_prefixes(ids), rounds)
            dictionary_ms = median_ms(lambda ids=lists, r=rewards: dictionary_values(ids, r), min(rounds, 3))
            print(
                f"| {kind} | {size} | {length} | {values_ms:.2f} | {advantages_ms:.2f} | "
                f"{from_lists_ms - from_tensors_ms:.2f} | {dictionary_ms:.0f} | {dictionary_ms / values_ms:.0f} |"
            )


if __name__ == "__main__":
    main()
