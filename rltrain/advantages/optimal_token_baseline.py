"""The optimal token baseline: a mean of the rewards weighted by squared score norms (arXiv 2602.07078)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.group import as_rewards
from rltrain.advantages.score_norms import exact_norms
from rltrain.advantages.written import among_zeros, written_values
from rltrain.config import AdvantageConfig
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group, Need

EPS = 1e-8


@dataclass(kw_only=True)
class OptimalTokenBaselineConfig(AdvantageConfig):
    """See :func:`optimal_token_advantages`."""

    leave_one_out: bool = False  # leave a completion out of its own baseline

    def learns_from_equal_rewards(self) -> bool:
        return True


def optimal_token_advantages(
    norms: Sequence[Tensor], rewards: Sequence[float | None] | Tensor, *, leave_one_out: bool = False
) -> list[Tensor]:
    r"""``A_{i,t} = r_i - B_t``, float64, one tensor [T] per completion, from squared score norms w [T] of its tokens.

        W_t = sum_{k<=t} w_k        B_t = sum_j r_j·W_t^j / (sum_j W_t^j + 1e-8)

    The sums run over the completions that have a token t, i included. Beyond the second-longest B is 0, so that the
    rest of the longest gets its whole reward, also where all rewards are equal. ``leave_one_out`` leaves i out of its
    own baseline, which is then independent of its tokens.

    NaN or None rewards abstain: those completions are in no sum and get 0. A completion whose reward alone counts gets
    A = r.
    """
    rewards_G = as_rewards(rewards)
    counted = (~rewards_G.isnan()).nonzero().flatten().tolist()
    longest = max((len(norms_T) for norms_T in norms), default=0)
    sums_GT = torch.zeros((len(norms), longest), dtype=torch.float64)  # W of the completions that have a token t
    for i in counted:
        sums_GT[i, : len(norms[i])] = norms[i].double().cumsum(0)
    weighted_GT = sums_GT * rewards_G.nan_to_num(0.0)[:, None]
    lengths = sorted(len(norms[i]) for i in counted)
    shared_tokens = lengths[-2] if len(lengths) > 1 else 0
    rows = [torch.zeros(len(norms_T), dtype=torch.float64) for norms_T in norms]
    for i in counted:
        kept_G = torch.tensor([j != i or not leave_one_out for j in range(len(norms))])  # no difference of large sums
        baseline_T = weighted_GT[kept_G].sum(0) / (sums_GT[kept_G].sum(0) + EPS)
        baseline_T[shared_tokens:] = 0.0
        rows[i] = rewards_G[i] - baseline_T[: len(norms[i])]
    return rows


@register("advantage", "optimal_token_baseline", OptimalTokenBaselineConfig, needs={Need.ENTROPY})
def optimal_token_baseline(groups: Sequence[Group], config: OptimalTokenBaselineConfig, context: Context) -> Advantages:
    """:func:`optimal_token_advantages` with the exact norms of the sampling distribution, over written tokens.

    Token t is the t-th that the policy wrote, so that observations of other lengths shift nothing.
    """
    values = []
    for group, row in zip(groups, context.entropy(groups), strict=True):
        norms = [
            written_values(exact_norms(completion, token), completion)
            for completion, token in zip(group.completions, row, strict=True)
        ]
        rows = optimal_token_advantages(norms, as_rewards(group.rewards_G), leave_one_out=config.leave_one_out)
        values.append([among_zeros(*pair) for pair in zip(rows, group.completions, strict=True)])
    return Advantages(values=values)
