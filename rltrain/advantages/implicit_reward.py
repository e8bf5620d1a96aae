"""Implicit process reward without a reward model to train: log-ratio of two checkpoints (after PRIME, 2502.01456)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.group import as_rewards, group_advantages
from rltrain.advantages.scored_completions import all_completions, logprobs_of
from rltrain.advantages.whitening import whiten_where
from rltrain.advantages.written import among_zeros, counted_tokens
from rltrain.config import AdvantageConfig, RunConfig
from rltrain.errors import require
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group, Mean, Need


@dataclass(kw_only=True)
class ImplicitRewardConfig(AdvantageConfig):
    """See :func:`implicit_reward_returns` and :func:`implicit_reward`. Phi is that of ``scorer.*``."""

    beta: float = 0.05  # factor of the log-ratio of phi to the reference
    whiten: bool = True  # over the tokens of the global batch
    eps: float = 1e-8  # added to the std

    def __post_init__(self) -> None:
        require(self.beta > 0, f"advantage.beta={self.beta}: must be > 0; 0.05 is usual")
        require(self.eps > 0, f"advantage.eps={self.eps}: must be > 0, a batch of equal advantages has std 0")

    def learns_from_equal_rewards(self) -> bool:
        return True

    def check_run(self, run: RunConfig) -> None:
        starts_at = None if run.cold_start.steps else vars(run.model).get("path")
        reference = run.reference or starts_at
        phi = run.scorer.path or starts_at
        require(
            run.scorer.kind != "frozen" or run.scorer.cold_start.steps > 0 or phi != reference,
            f"scorer.kind=frozen, scorer.path={run.scorer.path}: phi and the reference are one model, whose log-ratio "
            "is 0; set scorer.kind=ema, or scorer.path to a better checkpoint",
        )


def implicit_reward_returns(token_rewards: Sequence[Tensor], rewards: Sequence[float | None] | Tensor) -> list[Tensor]:
    r"""``A_{i,t} = sum_{s >= t} (q_{i,s} - b_i) + (r_i - c_i)``, float64, one tensor [T] per completion.

    ``b_i`` is the mean over the other completions of their mean token reward, ``c_i`` that of their rewards. The
    outcome stands on the last token, so that the reward to go holds it at every token (discount 1). PRIME's released
    code divides ``q - mean`` otherwise within a completion; the sum over its tokens is the same.

    NaN or None rewards abstain: those completions are among no others and get 0. Fewer than two rewards that count
    give exact zeros. Completions without tokens have no mean token reward and are left out of b.
    """
    rewards_G = as_rewards(rewards)
    means_G = torch.tensor([float(q_T.mean()) if len(q_T) else torch.nan for q_T in token_rewards]).double()
    means_G = means_G.masked_fill(rewards_G.isnan(), torch.nan)
    outcomes_G = group_advantages(rewards_G, baseline="leave_one_out", scale="none")
    counted, returns = int((~rewards_G.isnan()).sum()), []
    for i, q_T in enumerate(token_rewards):
        others_G = torch.cat([means_G[:i], means_G[i + 1 :]])
        if rewards_G[i].isnan() or counted < 2 or others_G.isnan().all():
            returns.append(torch.zeros(len(q_T), dtype=torch.float64))
            continue
        to_go_T = (q_T.double() - others_G.nanmean()).flip(0).cumsum(0).flip(0)
        returns.append(to_go_T + outcomes_G[i])
    return returns


@register("advantage", "implicit_reward", ImplicitRewardConfig, needs={Need.SCORER, Need.REFERENCE_LOGPROBS})
def implicit_reward(groups: Sequence[Group], config: ImplicitRewardConfig, context: Context) -> Advantages:
    """:func:`implicit_reward_returns` of ``q_t = beta·(log pi_phi - log pi_ref)``, whitened over the global batch.

    The reference is the initial policy, or ``reference``. Population std (ddof 0) plus ``eps``, over all ranks;
    ``whiten=False`` returns A. A group of equal rewards still has token rewards that differ, and takes part.
    Completions that abstain, and groups of fewer than two that do not, are in no statistic and get 0. With
    ``scorer.kind=ema`` phi is the initial policy at the first step, and q is 0 where the reference is, too. Ids that an
    environment wrote have no q: they are left out of the sums, the means and the whitening.
    """
    wanted = all_completions(groups)
    token_rewards = [[torch.zeros(one.written_tokens).double() for one in group.completions] for group in groups]
    scored = (logprobs_of(groups, wanted, score) for score in (context.scorer.phi, context.scorer.reference))
    for (p, g, _), phi_W, reference_W in zip(wanted, *scored, strict=True):
        token_rewards[p][g] = config.beta * (phi_W - reference_W)
    rewards = [as_rewards(group.rewards_G) for group in groups]
    values = [implicit_reward_returns(*pair) for pair in zip(token_rewards, rewards, strict=True)]
    values, token_rewards = _laid_out(values, groups), _laid_out(token_rewards, groups)
    kept = [[bool((~row_G.isnan()).sum() > 1) and not reward.isnan() for reward in row_G] for row_G in rewards]
    counted = counted_tokens(groups, kept)
    if config.whiten:
        values = whiten_where(values, counted, eps=config.eps, name="advantages of implicit rewards")
    return Advantages(values=values, metrics=_metrics(token_rewards, kept, counted), notes=_notes(token_rewards))


def _laid_out(rows: Sequence[Sequence[Tensor]], groups: Sequence[Group]) -> list[list[Tensor]]:
    return [
        [among_zeros(*pair) for pair in zip(of_group, group.completions, strict=True)]
        for of_group, group in zip(rows, groups, strict=True)
    ]


def _metrics(
    token_rewards: Sequence[Sequence[Tensor]], kept: Sequence[Sequence[bool]], counted: Sequence[Sequence[Tensor]]
) -> dict[str, Mean]:
    rows = [
        q_T[mask_T]
        for group, flags, masks in zip(token_rewards, kept, counted, strict=True)
        for q_T, keep, mask_T in zip(group, flags, masks, strict=True)
        if keep
    ]
    return {
        "implicit_reward/token_mean": Mean.of(torch.cat([torch.zeros(0).double(), *rows])),
        "implicit_reward/completion_mean": Mean.of([float(q_T.sum()) for q_T in rows]),
    }


def _notes(token_rewards: Sequence[Sequence[Tensor]]) -> list[dict[str, list[list[float]]]]:
    """The token rewards, for the samples."""
    return [{"token_reward": [q_T.tolist() for q_T in group]} for group in token_rewards]
