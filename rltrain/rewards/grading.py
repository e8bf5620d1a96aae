"""``context.grade``: a run's own rewards on completions that are no part of the step, such as continued ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

from rltrain.config import RewardConfig, RunConfig
from rltrain.errors import ConfigError
from rltrain.policy.load import Policy
from rltrain.registry import needs_of
from rltrain.rewards import failures
from rltrain.rewards.scoring import score
from rltrain.rollout.stopping import StopRule
from rltrain.runs.part_states import copies
from rltrain.types import Completion, Context, Continuer, Grader, Group, Need, RolloutServices, State


class _InsideGrading:
    """In the place of continuations and grades for a reward that is itself called to grade."""

    def continue_(self, requests: Any) -> NoReturn:
        """Refuse."""
        raise ConfigError(
            "a reward that asks for continuations cannot grade those of another part; leave the reward or that part out"
        )

    __call__ = continue_


@dataclass(frozen=True, kw_only=True)
class RunGrader:
    """The service behind ``context.grade``.

    Rewards get the services of ``context``, but for continuations and grades; their states, by ``state_of``, are to
    be used and forgotten.
    """

    rewards: Mapping[str, RewardConfig]
    context: Context
    rule: StopRule
    state_of: Callable[[str], State]

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        """See :class:`~rltrain.types.Grader`."""
        if not groups and not any(needs_of(config) for config in self.rewards.values()):
            return []  # where some need a service, this rank takes part in the calls of the others
        refusing = _InsideGrading()
        services = RolloutServices(prober=self.context.rollout.prober, continuer=cast(Continuer, refusing))
        context = replace(self.context, rollout=services, grade=cast(Grader, refusing), state_of=self.state_of)
        with failures.set_aside():
            graded, _ = score([self._with_texts(group) for group in groups], self.rewards, context)
        return graded

    def _with_texts(self, group: Group) -> Group:
        return replace(group, completions=tuple(with_text(each, self.rule) for each in group.completions))


def with_text(completion: Completion, rule: StopRule) -> Completion:
    """The completion with its text, and those of its turns, decoded from its ids. What failed has no text to judge."""
    if not completion.turns:
        return replace(completion, text=rule.text(completion.token_ids))
    start, turns = 0, []
    for turn in completion.turns:
        turns.append(replace(turn, text=rule.text(completion.token_ids[start : start + turn.written])))
        start += turn.written + turn.observed
    return replace(completion, text="" if completion.failed else turns[-1].text, turns=tuple(turns))


def with_grades(context: Context, config: RunConfig, policy: Policy) -> Context:
    """The context with ``grade``, where a part of the run declares ``Need.CONTINUATIONS``."""
    if Need.CONTINUATIONS not in config.needs():
        return context
    rule = StopRule.of(policy, config.sampling)
    grader = RunGrader(rewards=config.rewards, context=context, rule=rule, state_of=copies(context.state_of))
    return replace(context, grade=grader)
