"""The rewards that an environment gave in the turns of a completion, as a part of its outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rltrain.config import RewardConfig
from rltrain.errors import ConfigError
from rltrain.registry import register
from rltrain.types import Completion, Context, Group, Scores


@dataclass(kw_only=True)
class TurnRewardsConfig(RewardConfig):
    """See :func:`turn_rewards`."""

    def sums_turns(self) -> bool:
        return True


@register("reward", "turn_rewards", TurnRewardsConfig)
def turn_rewards(groups: Sequence[Group], config: TurnRewardsConfig, context: Context) -> Scores:
    """The sum of ``Turn.reward`` over the turns of a completion; ``ConfigError`` for one without turns."""
    return Scores(scores=[[_sum(completion, group) for completion in group.completions] for group in groups])


def _sum(completion: Completion, group: Group) -> float:
    if completion.token_ids and not completion.turns:
        raise ConfigError(
            f"rewards: a completion of problem {group.prompt.problem.id} has no turns, whose rewards could be summed; "
            "choose an environment, or remove the reward turn_rewards"
        )
    return sum(turn.reward for turn in completion.turns)
