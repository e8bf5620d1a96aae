"""Entropies that a test writes down, in the place of a model's."""

import torch

from rltrain.types import TokenEntropy


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def entropies(table, collisions=None):
    """``context.entropy`` with ``table[p][g]`` a list of numbers per completion, whatever the groups."""
    collisions = collisions or [[[0.5] * len(row) for row in rows] for rows in table]
    return lambda groups: [
        [TokenEntropy(entropy_T=float64(h), collision_T=float64(c)) for h, c in zip(rows, of_rows, strict=True)]
        for rows, of_rows in zip(table, collisions, strict=True)
    ]


def by_place(groups):
    """``context.entropy``: a number per token that depends on its id and place, with many ties."""

    def of(ids):
        values_T = float64([0.25 * (token % 4) + 0.5 * (t % 2) for t, token in enumerate(ids)])
        return TokenEntropy(entropy_T=values_T, collision_T=0.9 - values_T / 2)

    return [[of(ids) for ids in group.completion_ids] for group in groups]
