"""OPD, on-policy distillation: a teacher's log-prob of each sampled token less the policy's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.scored_completions import (
    all_completions,
    logprobs_of,
    require_whole_distribution,
    zeros_like_completions,
)
from rltrain.advantages.written import among_zeros, written_values
from rltrain.config import AdvantageConfig, RunConfig
from rltrain.errors import require
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group, Mean, Need


@dataclass(kw_only=True)
class OPDConfig(AdvantageConfig):
    """See :func:`opd`. The teacher is ``scorer.path``. ``max_drop=null`` drops none."""

    max_drop: float | None = 0.2  # tokens whose probability fell by more since they were sampled are dropped

    def __post_init__(self) -> None:
        require(
            self.max_drop is None or 0 < self.max_drop <= 1,
            f"advantage.max_drop={self.max_drop}: must lie in (0, 1], a difference of probabilities; null drops none",
        )

    def uses_rewards(self) -> bool:
        return False

    def learns_from_equal_rewards(self) -> bool:
        return True

    def check_run(self, run: RunConfig) -> None:
        require(
            run.scorer.kind == "frozen" and not run.scorer.is_initial,
            f"scorer.kind={run.scorer.kind}, scorer.path={run.scorer.path}: distillation has no teacher; set "
            "scorer.kind=frozen and scorer.path=FOLDER of a model with the policy's vocabulary",
        )
        require_whole_distribution(run, "distillation")


def opd_advantages(teacher_T: Tensor, policy_T: Tensor) -> Tensor:
    """``A_t = log pi_teacher(y_t) - log pi(y_t)``, float64 [T], from log-probs at temperature 1 in nats."""
    return teacher_T.double() - policy_T.double()


def fell(sampler_T: Tensor, policy_T: Tensor, *, max_drop: float) -> Tensor:
    """``pi_sampler(y_t) - pi(y_t) > max_drop``, bool [T], from log-probs.

    A token's probability falls between sampling and training where the sampler's weights are older.
    """
    return sampler_T.double().exp() - policy_T.double().exp() > max_drop


@register("advantage", "opd", OPDConfig, needs={Need.SCORER})
def opd(groups: Sequence[Group], config: OPDConfig, context: Context) -> Advantages:
    """:func:`opd_advantages` of every completion, 0 on the tokens that :func:`fell`. Rewards are not used.

    The loss leaves out completions that abstain, where there are rewards. ``opd/reverse_kl`` is the mean of
    log pi - log pi_teacher over the written tokens, an estimate of KL(pi || teacher) per token.
    """
    wanted, values = all_completions(groups), zeros_like_completions(groups)
    teachers, policies = (logprobs_of(groups, wanted, score) for score in (context.scorer.phi, context.scorer.policy))
    gaps, dropped = Mean(total=0, count=0), Mean(total=0, count=0)
    for (p, g, _), teacher_W, policy_W in zip(wanted, teachers, policies, strict=True):
        completion, row_W = groups[p].completions[g], opd_advantages(teacher_W, policy_W)
        gaps += Mean.of(-row_W)
        if config.max_drop is not None:
            sampler_W = written_values(torch.tensor(completion.logprobs, dtype=torch.float64), completion)
            fell_W = fell(sampler_W, policy_W, max_drop=config.max_drop)
            row_W = row_W.masked_fill(fell_W, 0.0)
            dropped += Mean.of(fell_W)
        values[p][g] = among_zeros(row_W, completion)
    return Advantages(values=values, metrics={"opd/reverse_kl": gaps, "opd/dropped_share": dropped})
