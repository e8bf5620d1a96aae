"""HICRA: more weight on the tokens of planning phrases (arXiv 2509.03646)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rltrain.advantages.group import as_rewards, group_advantages
from rltrain.advantages.phrases import compiled, in_phrases
from rltrain.advantages.written import among_zeros
from rltrain.config import AdvantageConfig
from rltrain.errors import RunError, require
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group, Mean


def _planning() -> list[str]:
    """Phrases with which a solution turns, checks or goes on. A choice of ours: the paper mines a list per model."""
    return [
        "let's", "let me", "first", "next", "then", "now we", "wait", "hold on", "alternatively", "another way",
        "instead", "we need to", "we can use", "we know that", "notice that", "recall that", "suppose", "assume",
        "check", "double-check", "verify", "to verify", "going back", "try", "so the answer",
    ]  # fmt: skip


@dataclass(kw_only=True)
class HicraConfig(AdvantageConfig):
    """See :func:`hicra`. ``phrases`` are matched as whole words, their spaces as any white space."""

    alpha: float = 0.2  # share of its size that a planning token adds to its advantage; 0 is GRPO
    phrases: list[str] = field(default_factory=_planning)  # planning phrases, matched as whole words
    ignore_case: bool = True  # match phrases in any case
    eps: float = 1e-6  # added to the group's std

    def __post_init__(self) -> None:
        require(self.alpha >= 0, f"advantage.alpha={self.alpha}: must be >= 0; 0 is GRPO")
        require(self.eps >= 0, f"advantage.eps={self.eps}: must be >= 0")
        wanted = "advantage.phrases: lists no phrase; give planning phrases such as [wait, let me check]"
        require(bool(self.phrases), wanted)
        empty = [phrase for phrase in self.phrases if not phrase.strip()]
        require(not empty, f"advantage.phrases: holds {empty!r}, which is in every text; remove it")


@register("advantage", "hicra", HicraConfig)
def hicra(groups: Sequence[Group], config: HicraConfig, context: Context) -> Advantages:
    r"""``A_{i,t} = A_i + alpha·|A_i|`` on tokens inside a planning phrase, ``A_i`` elsewhere, float64.

    A_i is GRPO's advantage (sample std, ddof 1, plus ``eps``). The phrases are searched for in the decoded completion,
    and their tokens are those of the sampled ids. What an environment wrote is not searched, and no phrase spans
    two turns. NaN rewards abstain and get 0. All rewards equal gives exact zeros.
    """
    if context.tokenizer is None:
        raise RunError("advantage=hicra: the tokenizer is not at hand, and phrases are looked for in text")
    pattern = compiled(config.phrases, ignore_case=config.ignore_case)
    values, planning = [], Mean(total=0, count=0)
    for group in groups:
        rows = []
        for completion, advantage in zip(
            group.completions, group_advantages(as_rewards(group.rewards_G), eps=config.eps), strict=True
        ):
            spans = completion.written_spans
            inside = [in_phrases(context.tokenizer, completion.token_ids[slice(*span)], pattern) for span in spans]
            inside_W = torch.cat([torch.zeros(0, dtype=torch.bool), *inside])
            row_W = torch.where(inside_W, advantage + config.alpha * advantage.abs(), advantage)
            rows.append(among_zeros(row_W, completion))
            planning += Mean.of(inside_W)
        values.append(rows)
    return Advantages(values=values, metrics={"hicra/planning_share": planning})
