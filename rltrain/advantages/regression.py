"""A baseline fitted by score-weighted regression on what the other completions got, over the steps of a run."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.group import as_rewards
from rltrain.advantages.prefix_tree import common_prefixes, leave_one_out_values, prefix_scales
from rltrain.advantages.score_norms import exact_norms, lite_norms
from rltrain.advantages.written import written_mask
from rltrain.batching.zero_variance import is_zero_variance
from rltrain.config import AdvantageConfig
from rltrain.errors import require, require_one_of
from rltrain.registry import register
from rltrain.runtime import dist
from rltrain.types import Advantages, Context, Group, Mean, Need

MEAN_OF_OTHERS = 1  # the place of R in the features


@dataclass(kw_only=True)
class RegressionConfig(AdvantageConfig):
    """See :func:`regression`.

    ``weight=exact`` needs the service ENTROPY. ``running_sum`` weighs a place by the weights up to it. ``tree=false``
    leaves T out of the features. ``zero_equal_groups`` gives groups of equal rewards 0; a division by their std does.
    For ``prefix_scale`` see :func:`~rltrain.advantages.prefix_tree.prefix_scales`.
    """

    weight: str = "lite"  # weight of a token: lite from its log-prob, exact from the whole distribution
    running_sum: bool = False  # weigh a token by the weights up to it
    tree: bool = True  # take the prefix tree's value as a feature
    scale: str = "none"  # std divides by the group's std + eps, none does not
    zero_equal_groups: bool = False  # give groups of equal rewards 0
    decay: float = 0.9  # of the sums of earlier rollouts, per rollout
    ridge: float = 0.03  # pull towards RLOO, relative to the diagonal
    prefix_scale: bool = False  # times (2n - 1)/n, n completions sharing the prefix
    kappa: float = 1.0  # weight of the shorter prefix's value, in completions
    eps: float = 1e-6  # added to the std

    def __post_init__(self) -> None:
        require_one_of(("lite", "exact"), "advantage.weight", self.weight)
        require_one_of(("std", "none"), "advantage.scale", self.scale)
        require(0 <= self.decay < 1, f"advantage.decay={self.decay}: must lie in [0, 1); 0.9 is usual")
        require(self.ridge > 0, f"advantage.ridge={self.ridge}: must be > 0, or the fit may be singular")
        require(self.kappa > 0, f"advantage.kappa={self.kappa}: must be > 0; 1 is usual")
        require(self.eps >= 0, f"advantage.eps={self.eps}: must be >= 0")

    def user_needs(self) -> frozenset[Need]:
        return frozenset({Need.ENTROPY}) if self.weight == "exact" else frozenset()

    def learns_from_equal_rewards(self) -> bool:
        return True  # the fit does, also where these groups are given 0


@dataclass(frozen=True, kw_only=True)
class RegressionSums:
    """``M = sum w f f'`` and ``q = sum w f r`` over tokens, float64."""

    moments_FF: Tensor
    targets_F: Tensor

    def coefficients(self, ridge: float) -> Tensor:
        """``c = (M + D)^-1 (q + D·e_R)`` with ``D = ridge·diag(M)``; e_R while an entry of diag(M) is 0."""
        mean_of_others_F = torch.zeros_like(self.targets_F)
        mean_of_others_F[MEAN_OF_OTHERS] = 1.0
        diagonal_F = self.moments_FF.diagonal()
        if not bool((diagonal_F > 0).all()):
            return mean_of_others_F
        pull_F = ridge * diagonal_F
        return torch.linalg.solve(self.moments_FF + pull_F.diag(), self.targets_F + pull_F * mean_of_others_F)

    def followed_by(self, newer: RegressionSums, decay: float) -> RegressionSums:
        """These sums, decayed, and those of a newer rollout."""
        return RegressionSums(
            moments_FF=decay * self.moments_FF + newer.moments_FF, targets_F=decay * self.targets_F + newer.targets_F
        )


@dataclass(frozen=True, kw_only=True)
class RegressionRow:
    """A completion whose reward counts, beside another whose does: its features and weights, token by token."""

    reward: float
    features_TF: Tensor
    weights_T: Tensor

    def sums(self) -> RegressionSums:
        weighted_TF = self.weights_T[:, None] * self.features_TF
        return RegressionSums(moments_FF=weighted_TF.T @ self.features_TF, targets_F=weighted_TF.sum(0) * self.reward)


def rows_of_group(group: Group, norms: Sequence[Tensor], config: RegressionConfig) -> list[RegressionRow | None]:
    r"""Per completion the features ``f = (1, R, T(s_t))`` and the weights w.

    None where the reward abstains, or alone counts in its group. The weights are 0 at observed ids. R is the mean
    reward of the others, T is :func:`~rltrain.advantages.prefix_tree.leave_one_out_values`.
    """
    rewards_G = as_rewards(group.rewards_G)
    values = leave_one_out_values(common_prefixes(group.completion_ids), rewards_G, kappa=config.kappa)
    counted_G = ~rewards_G.isnan()
    total, others = rewards_G[counted_G].sum(), int(counted_G.sum()) - 1
    rows: list[RegressionRow | None] = []
    columns = zip(rewards_G, counted_G, values, norms, group.completions, strict=True)
    for reward, counts, value_T, norms_T, completion in columns:
        if not counts or others < 1:
            rows.append(None)
            continue
        ones_T = torch.ones(len(value_T), dtype=torch.float64)
        features = [ones_T, ones_T * ((total - reward) / others), *([value_T] if config.tree else [])]
        weights_T = norms_T.cumsum(0).masked_fill(~written_mask(completion), 0.0) if config.running_sum else norms_T
        rows.append(RegressionRow(reward=float(reward), features_TF=torch.stack(features, 1), weights_T=weights_T))
    return rows


def regression_advantages(group: Group, rows: Sequence[RegressionRow | None], c_F: Tensor, config: RegressionConfig):
    """``A_t = k_t·(r - c'f_t) / (std(r) + eps)`` of the group's rows, float64; 0 for those that are None.

    k is 1, or with ``prefix_scale`` the scale of the place.
    """
    rewards_G = as_rewards(group.rewards_G)
    equal = is_zero_variance(rewards_G)
    if equal and (config.zero_equal_groups or config.scale == "std"):
        return [torch.zeros(len(ids), dtype=torch.float64) for ids in group.completion_ids]
    divisor = rewards_G[~rewards_G.isnan()].std(correction=1) + config.eps if config.scale == "std" else 1.0
    values = [
        torch.zeros(len(ids), dtype=torch.float64) if row is None else (row.reward - row.features_TF @ c_F) / divisor
        for ids, row in zip(group.completion_ids, rows, strict=True)
    ]
    if not config.prefix_scale:
        return values
    scales = prefix_scales(group.completion_ids, rewards_G)
    return [value_T * scale_T for value_T, scale_T in zip(values, scales, strict=True)]


@register("advantage", "regression", RegressionConfig, needs={Need.STATE})
def regression(groups: Sequence[Group], config: RegressionConfig, context: Context) -> Advantages:
    r"""``A_t = r_i - c'f(s_t)``, float64, with c fitted on the rollouts before this one.

        w = (1 - p)²  (lite)   or   1 - 2p + sum_v pi_v²  (exact);   their running sums with ``running_sum``
        after the advantages, over all completions of all ranks:   M <- decay·M + sum w f f',   q <- decay·q + sum w f r
        c = (M + D)^-1 (q + D·e_R),   D = ridge·diag(M);   c = e_R (RLOO) at the first step

    f = (1, R, T(s_t)) depends on the other completions and on s_t, and c on the past, so the estimate is unbiased
    without the division by std (sample std, ddof 1, plus ``eps``) and without ``prefix_scale``, which multiplies A by
    (2n - 1)/n. Equal rewards do not give zeros, unless that is asked for. A reward that abstains, or that alone counts
    in its group, gives 0 and is in no sum. With p = 1 everywhere M is 0 and c stays e_R.
    """
    norms = _norms(groups, config, context)
    rows = [rows_of_group(group, norms_G, config) for group, norms_G in zip(groups, norms, strict=True)]
    before = _stored(context.state, features=3 if config.tree else 2)
    c_F = before.coefficients(config.ridge)
    values = [regression_advantages(group, of_group, c_F, config) for group, of_group in zip(groups, rows, strict=True)]
    _store(context.state, before.followed_by(_of_all_ranks(rows, like=before), config.decay))
    names = ("constant", "mean_of_others", "tree")
    metrics = {f"regression/{name}": Mean.of(float(c)) for name, c in zip(names, c_F, strict=False)}
    return Advantages(values=values, metrics=metrics)


def _norms(groups: Sequence[Group], config: RegressionConfig, context: Context) -> list[list[Tensor]]:
    if config.weight == "lite":
        return [[lite_norms(completion) for completion in group.completions] for group in groups]
    return [
        [exact_norms(*pair) for pair in zip(group.completions, row, strict=True)]
        for group, row in zip(groups, context.entropy(groups), strict=True)
    ]


def _of_all_ranks(rows: Sequence[Sequence[RegressionRow | None]], *, like: RegressionSums) -> RegressionSums:
    sums = RegressionSums(moments_FF=torch.zeros_like(like.moments_FF), targets_F=torch.zeros_like(like.targets_F))
    for row in (row for of_group in rows for row in of_group if row is not None):
        sums = sums.followed_by(row.sums(), 1.0)
    count = len(sums.targets_F)
    flat = dist.all_sum(torch.cat([sums.moments_FF.ravel(), sums.targets_F]), name="sums of the regression")
    return RegressionSums(moments_FF=flat[: count * count].reshape(count, count), targets_F=flat[count * count :])


def _stored(state: MutableMapping[str, Tensor], *, features: int) -> RegressionSums:
    """The sums of earlier rollouts; 0 at the first."""
    if "moments_FF" not in state:
        nothing_F = torch.zeros(features, dtype=torch.float64)
        return RegressionSums(moments_FF=nothing_F[:, None] * nothing_F, targets_F=nothing_F)
    return RegressionSums(moments_FF=state["moments_FF"], targets_F=state["targets_F"])


def _store(state: MutableMapping[str, Tensor], sums: RegressionSums) -> None:
    state["moments_FF"], state["targets_F"] = sums.moments_FF, sums.targets_F
