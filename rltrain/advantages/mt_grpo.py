"""MT-GRPO: the group advantage of the outcome, and beside it one for the reward of each turn (arXiv 2505.11821)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.group import as_rewards, group_advantages
from rltrain.advantages.turn_credit import on_tokens, require_environment, sums_of_rewards, turns_of
from rltrain.config import AdvantageConfig, RunConfig
from rltrain.errors import require, require_one_of
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group, Mean, Turn


@dataclass(kw_only=True)
class MTGRPOConfig(AdvantageConfig):
    """See :func:`mt_grpo_advantages`."""

    turn_weight: float = 1.0  # lambda, the weight of the turns' rewards; 0 leaves the outcome's
    estimate: str = "added"  # of a turn's advantage: added to the outcome's, or that of the summed rewards to go
    credited: str = "answered"  # turns that get credit for their reward: those with an observation, or all
    eps: float = 1e-4  # added to the std

    def __post_init__(self) -> None:
        require(self.turn_weight >= 0, f"advantage.turn_weight={self.turn_weight}: must be >= 0; 1 is the paper's")
        require_one_of(("added", "to_go"), "advantage.estimate", self.estimate)
        require_one_of(("answered", "all"), "advantage.credited", self.credited)
        require(self.eps >= 0, f"advantage.eps={self.eps}: must be >= 0")

    def learns_from_equal_rewards(self) -> bool:
        return self.turn_weight > 0  # the turns' rewards may differ where the outcomes do not

    def check_run(self, run: RunConfig) -> None:
        require_environment(run, "mt_grpo")
        summed = [name for name, reward in run.rewards.items() if reward.sums_turns()]
        require(
            not summed or self.turn_weight == 0,
            f"rewards.{''.join(summed[:1])}: puts the turns' rewards into the outcome, and advantage=mt_grpo adds them "
            f"by advantage.turn_weight={self.turn_weight:g}; remove that reward",
        )


def mt_grpo_advantages(
    turns: Sequence[Sequence[Turn]],
    outcomes: Sequence[float | None] | Tensor,
    *,
    turn_weight: float = 1.0,
    estimate: str = "added",
    credited: str = "answered",
    eps: float = 1e-4,
) -> list[Tensor]:
    r"""One float64 tensor [K] per completion: the advantage of each of its K turns.

        N(x)_i = (x_i - mean(x)) / (std(x) + eps)      over the completions of the group that have an x
        A_{i,k} = N(R)_i + lambda·N(r_k)_i             estimate "added", R the outcomes, r_k the rewards of k-th turns
        A_{i,k} = N(R + lambda·sum_{l>=k} r_l)_i       estimate "to_go"

    Sample std (ddof 1). So a credited turn k gets its advantage among the k-th turns of the group. Credited are the
    turns with an observation, or all with ``credited="all"``. Another turn gets ``N(R)_i``. A completion without a
    credited turn gets ``N(R + lambda·sum_l r_l)_i``, where the sum is over all its turns.

    With one observation at most, and lambda = 1, these are the released code's two estimates ("aae" and "cae", its
    discount 1). More turns are our generalisation: the paper's needs a tree of rollouts.
    NaN or None outcomes abstain: they leave all statistics and get 0. An x that is equal for all, or that fewer than
    two have, gives N = 0.
    """
    outcomes_G = as_rewards(outcomes)
    counted = (~outcomes_G.isnan()).nonzero().flatten().tolist()
    marks = [[credited == "all" or turn.observed > 0 for turn in row] for row in turns]
    outcome_G = group_advantages(outcomes_G, eps=eps)
    whole_G = group_advantages(outcomes_G + turn_weight * sums_of_rewards(turns), eps=eps)
    rows = [torch.zeros(len(row), dtype=torch.float64) for row in turns]
    for i in counted:
        rows[i][:] = outcome_G[i] if any(marks[i]) else whole_G[i]
    for k in range(max((len(row) for row in turns), default=0)):
        of_turn_G = _of_turns(turns, outcomes_G, k, turn_weight, estimate, eps)
        for i in (i for i in counted if k < len(turns[i]) and marks[i][k]):
            rows[i][k] = of_turn_G[i] + (outcome_G[i] if estimate == "added" else 0.0)
    return rows


def _of_turns(
    turns: Sequence[Sequence[Turn]], outcomes_G: Tensor, k: int, turn_weight: float, estimate: str, eps: float
) -> Tensor:
    """What the k-th turns (from 0) get for their rewards, [G]; 0 where a completion has none."""
    absent_G = torch.tensor([k >= len(row) for row in turns])
    if estimate == "to_go":
        to_go_G = outcomes_G + turn_weight * sums_of_rewards([row[k:] for row in turns])
        return group_advantages(to_go_G.masked_fill(absent_G, torch.nan), eps=eps)
    reward_G = sums_of_rewards([row[k : k + 1] for row in turns])
    return turn_weight * group_advantages(reward_G.masked_fill(absent_G | outcomes_G.isnan(), torch.nan), eps=eps)


@register("advantage", "mt_grpo", MTGRPOConfig)
def mt_grpo(groups: Sequence[Group], config: MTGRPOConfig, context: Context) -> Advantages:
    """:func:`mt_grpo_advantages` on the tokens that each turn wrote. ``RunError`` for a completion without turns.

    ``mt_grpo/turn_reward`` is the mean of the turns' rewards.
    """
    values, rewards = [], Mean(total=0, count=0)
    for group in groups:
        turns, outcomes_G = turns_of(group, "mt_grpo"), as_rewards(group.rewards_G)
        rows = mt_grpo_advantages(
            turns,
            outcomes_G,
            turn_weight=config.turn_weight,
            estimate=config.estimate,
            credited=config.credited,
            eps=config.eps,
        )
        values.append([on_tokens(*pair) for pair in zip(rows, group.completions, strict=True)])
        rewards += Mean.of([turn.reward for row in turns for turn in row])
    return Advantages(values=values, metrics={"mt_grpo/turn_reward": rewards})
