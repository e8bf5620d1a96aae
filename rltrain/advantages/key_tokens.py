"""How surely a token id goes with right or wrong completions of a group, and how often it stands in them."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

SATURATION, LENGTH_SHARE = 2.0, 0.5  # k1 and b' of the term frequencies
RATIO_EPS = 1e-5
Floats = NDArray[np.float64]


@functools.lru_cache(maxsize=65536)
def fisher_exact(a: int, b: int, c: int, d: int) -> float:
    """The two-sided p of Fisher's exact test of the table [[a, b], [c, d]]: of all tables with its margins, the
    probability of those that are no likelier. Exact, by integers.
    """
    row, column, total = a + b, a + c, a + b + c + d
    ways = [math.comb(row, k) * math.comb(total - row, column - k) for k in range(min(row, column) + 1)]
    return sum(way for way in ways if way <= ways[a]) / math.comb(total, column)


def _entropy_bits(ones: Floats, of: Floats) -> Floats:
    """Of a share ``ones / of``; 0 where there is nothing."""
    share = np.divide(ones, of, out=np.zeros_like(ones), where=of > 0)
    return sum((-p * np.log2(p, out=np.zeros_like(p), where=p > 0) for p in (share, 1 - share)), np.zeros_like(share))


def _association(a: Floats, b: Floats, c: Floats, d: Floats) -> Floats:
    """``F + IG``: how surely a token id goes with right or wrong answers, without a sign."""
    tables = zip(*(counts.astype(int).tolist() for counts in (a, b, c, d)), strict=True)
    p = np.array([fisher_exact(*table) for table in tables])
    total = a + b + c + d
    gain = _entropy_bits(a + c, total) - ((a + b) * _entropy_bits(a, a + b) + (c + d) * _entropy_bits(c, c + d)) / total
    return np.where(p < 1, np.exp(-2 * p), 0.0) + gain


def _frequency(counts: Floats, tokens: float, mean_tokens: float) -> Floats:
    """Term frequency of BM25: it saturates, and a side that is longer than the mean counts less."""
    share = counts / max(tokens, 1.0)
    return share * (SATURATION + 1) / (share + SATURATION * (1 - LENGTH_SHARE + LENGTH_SHARE * tokens / mean_tokens))


def token_weights(
    completion_ids: Sequence[Sequence[int]], right: Sequence[bool], *, ends: Collection[int] = ()
) -> tuple[NDArray[np.int64], Floats]:
    r"""The token ids that occur, ascending, and their weights ``w_v = (F + IG)·x / 2``.

    a, b: right and wrong completions that hold v; c, d: those that do not. F = exp(-2 p) with p of
    :func:`fisher_exact`, 0 if p = 1. IG is the information in bits that holding v gives on being right.

        x = h + tf_right/(tf_wrong + 1e-5) - tf_wrong/(tf_right + 1e-5)     h = asin√(a/(a+c)) - asin√(b/(b+d))
        tf = (f/N)·(k1 + 1) / (f/N + k1·(1 - b' + b'·N/avg))                k1 = 2, b' = 0.5

    f counts v among the N tokens of a side, avg is the mean N of the two sides. Ids in ``ends`` (EOS) weigh 0, and all
    do where all completions are right, or all wrong. Length 0 is a completion without tokens.
    """
    ids, held_by, count = _occurrences(completion_ids)
    vocabulary, index = np.unique(ids, return_inverse=True)
    right_G = np.array(right, dtype=bool)
    if not len(vocabulary) or right_G.all() or not right_G.any():
        return vocabulary, np.zeros(len(vocabulary))
    sides = (right_G, ~right_G)
    a, b = (np.bincount(index[side[held_by]], minlength=len(vocabulary)).astype(float) for side in sides)
    f_right, f_wrong = (
        np.bincount(index[side[held_by]], count[side[held_by]].astype(float), minlength=len(vocabulary))
        for side in sides
    )
    c, d = right_G.sum() - a, (~right_G).sum() - b
    mean_tokens = (f_right.sum() + f_wrong.sum()) / 2
    tf_right, tf_wrong = (_frequency(f.astype(float), float(f.sum()), mean_tokens) for f in (f_right, f_wrong))
    h = np.arcsin(np.sqrt(a / (a + c))) - np.arcsin(np.sqrt(b / (b + d)))
    x = h + tf_right / (tf_wrong + RATIO_EPS) - tf_wrong / (tf_right + RATIO_EPS)
    weights = _association(a, b, c, d) * x / 2
    return vocabulary, np.where(np.isin(vocabulary, list(ends)), 0.0, weights)


def _occurrences(
    completion_ids: Sequence[Sequence[int]],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Every pair of a completion and a token id that it holds: the id, the completion, and how often."""
    pairs = [np.unique(np.array(ids, dtype=np.int64), return_counts=True) for ids in completion_ids]
    held_by = np.repeat(np.arange(len(pairs)), [len(ids) for ids, _ in pairs])
    nothing = np.zeros(0, dtype=np.int64)
    ids, counts = (np.concatenate([nothing, *(pair[side] for pair in pairs)]) for side in (0, 1))
    return ids, held_by, counts
