"""What was tried on the regression baseline and stayed outside the package: functions for ``advantage=custom``.

regression.yaml trains them, and scripts/bench/regression.py judges them with ``--also regression_variants:unit_ridge``,
each with this folder in PYTHONPATH. On one rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rltrain.advantages.group import group_advantages, per_token
from rltrain.advantages.regression import (
    MEAN_OF_OTHERS,
    RegressionConfig,
    RegressionRow,
    RegressionSums,
    regression,
    regression_advantages,
    rows_of_group,
)
from rltrain.advantages.score_norms import exact_norms, lite_norms
from rltrain.types import Advantages, Context, Group, Need

Rows = list[list[RegressionRow | None]]


def warm_up(groups: Sequence[Group], options: Mapping[str, Any], context: Context) -> Advantages:
    """RLOO for the first ``options["rollouts"]`` rollouts, in which the fit collects, then the regression."""
    seen = int(context.state.get("rollouts", torch.zeros((), dtype=torch.int64)))
    context.state["rollouts"] = torch.tensor(seen + 1)
    fitted = regression(groups, RegressionConfig(), context)
    if seen >= options.get("rollouts", 5):
        return fitted
    rloo = [group_advantages(group.rewards_G, baseline="leave_one_out", scale="none") for group in groups]
    values = [per_token(rloo_G, group.completion_ids) for rloo_G, group in zip(rloo, groups, strict=True)]
    return Advantages(values=values, metrics=fitted.metrics)


def unit_ridge(groups: Sequence[Group], options: Mapping[str, Any], context: Context) -> Advantages:
    """The regression with ``D = mu·I``, ``mu = 0.03·tr(M)/F``, in place of ``0.03·diag(M)``."""
    norms = [[lite_norms(completion) for completion in group.completions] for group in groups]
    rows = [rows_of_group(group, of_group, RegressionConfig()) for group, of_group in zip(groups, norms, strict=True)]
    return fitted(groups, rows, context, coefficients=pulled_by_trace, features=3)


def peakedness(groups: Sequence[Group], options: Mapping[str, Any], context: Context) -> Advantages:
    """The regression with exact weights and ``f = (1, R, T, k, k·R)``, where ``k = sum_v pi_v²`` of the place."""
    rows: Rows = []
    for group, entropies in zip(groups, context.entropy(groups), strict=True):
        norms = [exact_norms(*pair) for pair in zip(group.completions, entropies, strict=True)]
        plain = rows_of_group(group, norms, RegressionConfig())
        pairs = zip(plain, entropies, strict=True)
        rows.append([None if row is None else with_peakedness(row, one.collision_T.double()) for row, one in pairs])
    return fitted(groups, rows, context, coefficients=lambda sums: sums.coefficients(0.03), features=5)


warm_up.needs = unit_ridge.needs = {Need.STATE}
peakedness.needs = {Need.STATE, Need.ENTROPY}


def with_peakedness(row: RegressionRow, collision_T: Tensor) -> RegressionRow:
    """The row with k and k·R behind its features."""
    added_T2 = torch.stack([collision_T, collision_T * row.features_TF[:, MEAN_OF_OTHERS]], 1)
    return dataclasses.replace(row, features_TF=torch.cat([row.features_TF, added_T2], 1))


def pulled_by_trace(sums: RegressionSums) -> Tensor:
    """``c = (M + mu·I)^-1 (q + mu·e_R)`` with ``mu = 0.03·tr(M)/F``; e_R while M is 0."""
    mean_of_others_F = torch.zeros_like(sums.targets_F)
    mean_of_others_F[MEAN_OF_OTHERS] = 1.0
    mu = 0.03 * sums.moments_FF.diagonal().mean()
    if not float(mu) > 0:
        return mean_of_others_F
    pulled_FF = sums.moments_FF + mu * torch.eye(len(mean_of_others_F), dtype=torch.float64)
    return torch.linalg.solve(pulled_FF, sums.targets_F + mu * mean_of_others_F)


def fitted(
    groups: Sequence[Group],
    rows: Rows,
    context: Context,
    *,
    coefficients: Callable[[RegressionSums], Tensor],
    features: int,
) -> Advantages:
    """The regression of other rows or another pull, with sums that decay by 0.9 a rollout."""
    state = context.state
    nothing_F = torch.zeros(features, dtype=torch.float64)
    sums = RegressionSums(
        moments_FF=state.get("moments_FF", nothing_F[:, None] * nothing_F), targets_F=state.get("targets_F", nothing_F)
    )
    c_F = coefficients(sums)
    pairs = zip(groups, rows, strict=True)
    values = [regression_advantages(group, of_group, c_F, RegressionConfig()) for group, of_group in pairs]
    decay = 0.9
    for row in (row for of_group in rows for row in of_group if row is not None):
        sums, decay = sums.followed_by(row.sums(), decay), 1.0
    state["moments_FF"], state["targets_F"] = sums.moments_FF, sums.targets_F
    return Advantages(values=values)
