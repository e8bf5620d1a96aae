"""SDPO, token form: the policy learns from its average that has seen a right answer to the problem (2601.20802)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rltrain.advantages.group import as_rewards
from rltrain.advantages.scored_completions import (
    Scored,
    logprobs_of,
    require_whole_distribution,
    zeros_like_completions,
)
from rltrain.advantages.written import among_zeros
from rltrain.config import AdvantageConfig, RunConfig
from rltrain.errors import RunError, require
from rltrain.registry import register
from rltrain.types import Advantages, Context, Group, Mean, Message, Need, TokenProblem

REPROMPT = "{prompt}\n\nCorrect solution:\n\n{solution}\n\n\nCorrectly solve the original question.\n"
PLACES = re.compile(r"\{(prompt|solution)\}")


@dataclass(kw_only=True)
class SDPOConfig(AdvantageConfig):
    """See :func:`sdpo`."""

    min_reward: float = 0.5  # from which on a completion is a solution
    think_close: str = "</think>"  # of a solution, what comes after the last of it is shown
    reprompt: str = REPROMPT  # the teacher's prompt; {prompt} and {solution} stand for the texts
    max_reprompt_tokens: int = 10240  # longer reprompts are not used

    def __post_init__(self) -> None:
        missing = [name for name in ("{prompt}", "{solution}") if name not in self.reprompt]
        require(not missing, f"advantage.reprompt={self.reprompt!r}: lacks {' and '.join(missing)}; add it")
        require(
            bool(self.think_close),
            "advantage.think_close is empty: set what ends a chain of thought, such as </think>",
        )
        require(
            self.max_reprompt_tokens >= 1, f"advantage.max_reprompt_tokens={self.max_reprompt_tokens}: set at least 1"
        )

    def learns_from_equal_rewards(self) -> bool:
        return True

    def check_run(self, run: RunConfig) -> None:
        require(
            run.scorer.kind != "policy",
            "scorer.kind=policy: the teacher of self-distillation is an average of the policy; set scorer.kind=ema",
        )
        require_whole_distribution(run, "self-distillation")


def shown_solution(text: str, think_close: str = "</think>") -> str:
    """What comes after the last ``think_close``, stripped; the whole text where it does not occur."""
    return text.rpartition(think_close)[2].strip()


def solutions(texts: Sequence[str], rewards: Sequence[float | None], config: SDPOConfig) -> list[list[str]]:
    """For each completion the solutions that it may be shown, in order of the samples: those of others.

    A completion is a solution if its reward is ``min_reward`` or more and something is left of it without its thinking.
    """
    rewards_G = as_rewards(rewards)
    shown = [shown_solution(text, config.think_close) for text in texts]
    right = [j for j, text in enumerate(shown) if text and rewards_G[j] >= config.min_reward]
    return [[shown[j] for j in right if j != i] for i in range(len(texts))]


def reprompted(prompt: str | Sequence[Message], solution: str, template: str) -> str | list[Message]:
    """The prompt with the template in place of its text, or of the last message's, which must be the user's."""
    if isinstance(prompt, str):
        return PLACES.sub(lambda place: {"prompt": prompt, "solution": solution}[place[1]], template)
    *before, last = prompt
    if last.get("role") != "user" or not isinstance(last.get("content"), str):
        raise RunError(
            "self-distillation: the last message of a problem is not a text of the user, so that no solution can be "
            "shown beside it; end data.messages with the user's question"
        )
    text = reprompted(last["content"], solution, template)
    return [*before, {**last, "content": text}]


def _reprompt_ids(group: Group, shown: Sequence[str], config: SDPOConfig, context: Context) -> tuple[int, ...] | None:
    """The ids of the first reprompt within the limit; None if there is none."""
    problem = group.prompt.problem
    if isinstance(problem, TokenProblem):
        raise RunError(
            f"self-distillation: problem {problem.id} makes its prompt of token ids, where no solution can be shown; "
            "choose data with questions as text"
        )
    for solution in shown:
        ids = context.encode(reprompted(problem.prompt, solution, config.reprompt))
        if 0 < len(ids) <= config.max_reprompt_tokens:
            return ids
    return None


def _wanted(groups: Sequence[Group], config: SDPOConfig, context: Context) -> tuple[list[Scored], dict[str, Mean]]:
    """The completions that have a teacher, each after its reprompt, and how many have none and why."""
    wanted: list[Scored] = []
    shown_share, long_share = Mean(total=0, count=0), Mean(total=0, count=0)
    for p, group in enumerate(groups):
        known: dict[tuple[str, ...], tuple[int, ...] | None] = {}
        rewards_G = as_rewards(group.rewards_G)
        options = solutions([completion.text for completion in group.completions], rewards_G.tolist(), config)
        for g, shown in enumerate(options):
            if tuple(shown) not in known:
                known[tuple(shown)] = _reprompt_ids(group, shown, config, context)
            ids = known[tuple(shown)]
            counts = not rewards_G[g].isnan() and group.completions[g].written_tokens > 0
            shown_share += Mean.of(float(ids is not None and counts))
            long_share += Mean.of(float(ids is None and bool(shown)))
            if ids is not None and counts:
                wanted.append((p, g, ids))
    return wanted, {"sdpo/taught_share": shown_share, "sdpo/too_long_share": long_share}


@register("advantage", "sdpo", SDPOConfig, needs={Need.SCORER})
def sdpo(groups: Sequence[Group], config: SDPOConfig, context: Context) -> Advantages:
    """``A_t = log pi_phi(y_t | reprompt, y_<t) - log pi(y_t | prompt, y_<t)`` at temperature 1, float64.

    The reprompt shows the first solution of the group that is another completion and fits. A solution of several turns
    is its last one. Completions without one, or
    that abstain, get exact zeros; they count in the loss's denominators unless they abstain. ``sdpo/gap`` is the mean
    of -A over the tokens taught.
    """
    values = zeros_like_completions(groups)
    wanted, metrics = _wanted(groups, config, context)
    plain = [(p, g, groups[p].prompt.token_ids) for p, g, _ in wanted]
    teachers = logprobs_of(groups, wanted, context.scorer.phi)
    policies = logprobs_of(groups, plain, context.scorer.policy)
    gap = Mean(total=0, count=0)
    for (p, g, _), teacher_W, policy_W in zip(wanted, teachers, policies, strict=True):
        row_W = teacher_W - policy_W
        values[p][g] = among_zeros(row_W, groups[p].completions[g])
        gap += Mean.of(-row_W)
    return Advantages(values=values, metrics=metrics | {"sdpo/gap": gap})
