"""The trie of a group's completions: exact token ids, no fuzzy matching, no extra rollouts.

The trie is never built. Rows sorted by their bytes have the completions of every node side by side. The common prefix
of two rows is then the minimum over the neighbours between them, and the values along a row are a step function.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rltrain.advantages.rewards import as_rewards
from rltrain.advantages.written import written_values
from rltrain.types import Group, Mean

TokenIds = Sequence[int] | Tensor


def _as_row(ids: TokenIds) -> NDArray[np.uint32]:
    if isinstance(ids, Tensor):
        return ids.detach().cpu().numpy().astype(np.uint32)
    # array("I") reads a tuple of Python ints two to three times faster than numpy or torch do.
    return np.asarray(array("I", ids))


def _first_difference(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> int:
    shorter = min(len(left), len(right))
    differs = left[:shorter] != right[:shorter]
    at = int(differs.argmax()) if shorter else 0
    return at if shorter and differs[at] else shorter


def common_prefixes(completion_ids: Sequence[TokenIds]) -> Tensor:
    """Tokens that completions i and j share from their start, int64, shape [G, G]. The diagonal holds the lengths.

    Ids lie in [0, 2**32). One comparison per neighbour after sorting: O(G·L) to read, O(G²) to combine.
    """
    rows = [_as_row(ids) for ids in completion_ids]
    keys = [row.tobytes() for row in rows]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    neighbours = [_first_difference(rows[a], rows[b]) for a, b in pairwise(order)]
    sorted_GG = np.diag([len(rows[i]) for i in order]).astype(np.int64)
    for i in range(len(neighbours)):
        sorted_GG[i, i + 1 :] = sorted_GG[i + 1 :, i] = np.minimum.accumulate(neighbours[i:])
    common_GG = np.empty_like(sorted_GG)
    common_GG[np.ix_(order, order)] = sorted_GG
    return torch.from_numpy(common_GG)


def node_values(common_GG: Tensor, rewards_G: Tensor) -> list[Tensor]:
    """:func:`prefix_values` from the matrix of :func:`common_prefixes` and float64 rewards with NaN for None."""
    depth_GG, counted_G = common_GG.numpy(), ~rewards_G.isnan().numpy()
    # Row i orders the group by the length of the prefix shared with i, longest first. Abstainers share no node: last.
    depth_GG = np.where(counted_G | np.eye(len(counted_G), dtype=bool), depth_GG, -1)
    order_GG = (-depth_GG).argsort(axis=1, kind="stable")
    shared_GG = np.take_along_axis(depth_GG, order_GG, axis=1)
    reward_GG, listed_GG = rewards_G.numpy()[order_GG], counted_G[order_GG]
    totals_GG = np.where(listed_GG, reward_GG, 0.0).cumsum(axis=1)
    lowest_GG = np.minimum.accumulate(np.where(listed_GG, reward_GG, np.inf), axis=1)
    highest_GG = np.maximum.accumulate(np.where(listed_GG, reward_GG, -np.inf), axis=1)
    # Clipped to the extremes, because a mean rounded beyond them would give credit at a node of equal rewards.
    means_GG = np.clip(totals_GG / np.maximum(listed_GG.cumsum(axis=1), 1), lowest_GG, highest_GG)
    means_GG[~counted_G] = np.nan
    # The mean over the first p of the order is V between the depths that p and p + 1 share.
    widths_GG = -np.diff(shared_GG, append=-1, axis=1)
    values = means_GG[:, ::-1].ravel().repeat(widths_GG[:, ::-1].ravel())
    return list(torch.from_numpy(values).split((common_GG.diagonal() + 1).tolist()))


def leaf_counts(common_GG: Tensor, counted_G: Tensor) -> list[Tensor]:
    """``n(s)`` = counted completions that start with s, along each completion, int64 [T + 1]; entry 0 is the root."""
    return [
        torch.bincount(common_G[counted_G], minlength=int(length) + 1).flip(0).cumsum(0).flip(0)
        for common_G, length in zip(common_GG, common_GG.diagonal(), strict=True)
    ]


def leaves_per_token(groups: Sequence[Group]) -> Mean:
    """Mean of n(s_{t+1}) over the written tokens of the groups' completions, whatever their rewards; 1 if none is
    shared."""
    shared = Mean(total=0, count=0)
    for group in groups:
        common_GG = common_prefixes(group.completion_ids)
        everybody_G = torch.ones(len(common_GG), dtype=torch.bool)
        rows = zip(leaf_counts(common_GG, everybody_G), group.completions, strict=True)
        shared += Mean.of(torch.cat([written_values(counts_T1[1:], completion) for counts_T1, completion in rows]))
    return shared


def node_starts(counts_T1: Tensor) -> Tensor:
    """Whether a depth is the first of its node, bool [T + 1]: a node is where the same completions share the prefix.

    ``counts_T1`` is :func:`leaf_counts` of a completion. The root is a node; so is every place where sharers part.
    """
    return torch.cat([torch.ones(1, dtype=torch.bool), counts_T1.diff() != 0])


def prefix_values(completion_ids: Sequence[TokenIds], rewards: Sequence[float | None] | Tensor) -> list[Tensor]:
    r"""``V(s)`` = mean reward of the completions that start with s, along each completion (arXiv 2509.18314).

    float64, a tensor of shape [T + 1] per completion: entry t is V of its first t tokens. Entry 0 is the group mean.
    Entry T is the completion's reward, or the mean with its duplicates and continuations.
    A completion cut at the length limit is a leaf like any other, and an empty completion has the root alone.

    NaN or None rewards abstain: those completions are not in the trie, and their own values are NaN.
    """
    return node_values(common_prefixes(completion_ids), as_rewards(rewards))


def prefix_scales(completion_ids: Sequence[TokenIds], rewards_G: Tensor) -> list[Tensor]:
    r"""``(2n - 1)/n`` per token, n completions whose reward counts through the prefix before it; float64, [T] each.

    1 on a token that is alone, up to 2 on shared prefixes. It is the scale that TEMPO gives the gradient, in
    expectation and on policy.
    """
    counts = leaf_counts(common_prefixes(completion_ids), ~rewards_G.isnan())
    shared = [counts_T1[:-1].clamp(min=1).double() for counts_T1 in counts]  # none where nobody counts
    return [(2 * n_T - 1) / n_T for n_T in shared]


def leave_one_out_values(common_GG: Tensor, rewards_G: Tensor, *, kappa: float = 1.0) -> list[Tensor]:
    r"""T(s_t): the mean reward of the other completions through s_t, drawn to that of the prefix before.

        T = R = mean of r_j, j != i             at the root
        T <- (sum_{j != i through s_t} r_j + kappa·T) / (n(s_t) - 1 + kappa)     wherever the sharers become fewer

    float64, one tensor [T] per completion, for the prefixes of t in 0..T-1 tokens. A completion that is alone keeps its
    value. NaN rewards abstain: they are in no sum, and have NaN, as has a completion whose reward alone counts.
    """
    depth_GG, rewards = common_GG.numpy(), rewards_G.numpy()
    counted = ~np.isnan(rewards)
    rows = []
    for i, tokens in enumerate(common_GG.diagonal().tolist()):
        others = counted & (np.arange(len(counted)) != i)
        known = bool(counted[i]) and bool(others.any())
        pair = depth_GG[i, others], rewards[others]
        row = _leave_one_out_row(*pair, tokens, kappa) if known else np.full(tokens, np.nan)
        rows.append(torch.from_numpy(row))
    return rows


def _leave_one_out_row(
    depth_O: NDArray[np.int64], reward_O: NDArray[np.float64], tokens: int, kappa: float
) -> NDArray[np.float64]:
    value = reward_O.mean()
    row = np.full(tokens, value)
    for depth in np.unique(depth_O):  # who shares so many tokens and no more is gone from the next prefix on
        through = depth_O > depth
        value = (reward_O[through].sum() + kappa * value) / (through.sum() + kappa)
        row[depth + 1 :] = value
    return row
