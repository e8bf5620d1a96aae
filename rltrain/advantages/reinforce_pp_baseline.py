"""REINFORCE++ with a group baseline: whitened over the tokens of the global batch (arXiv 2501.03262)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rltrain.advantages.group import as_rewards, group_advantages, per_token
from rltrain.advantages.whitening import whiten_where
from rltrain.advantages.written import counted_tokens
from rltrain.config import AdvantageConfig
from rltrain.errors import require
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group


@dataclass(kw_only=True)
class ReinforcePPBaselineConfig(AdvantageConfig):
    """See :func:`reinforce_pp_baseline`."""

    eps: float = 1e-8  # added to the std of the batch

    def __post_init__(self) -> None:
        require(self.eps > 0, f"advantage.eps={self.eps}: must be > 0, a batch of equal rewards has std 0")


@register("advantage", "reinforce_pp_baseline", ReinforcePPBaselineConfig)
def reinforce_pp_baseline(groups: Sequence[Group], config: ReinforcePPBaselineConfig, context: Context) -> Advantages:
    r"""``A = (B - mean_tokens(B)) / (std_tokens(B) + eps)`` with ``B_i = r_i - mean(r)`` on every token of i, float64.

    Mean and population std (ddof 0) run over all written tokens of the global batch, all ranks. Long completions weigh
    more, so the token mean of B need not be 0. NaN rewards abstain: their tokens leave the statistics and get 0. All
    groups of equal rewards, and G = 1, give exact zeros.
    """
    centred = [
        per_token(group_advantages(as_rewards(group.rewards_G), scale="none"), group.completion_ids) for group in groups
    ]
    return Advantages(
        values=whiten_where(centred, counted_tokens(groups), eps=config.eps, name="group-centred rewards")
    )
