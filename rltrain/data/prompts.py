"""The prompts of a step: sampled problems, encoded, this rank's share."""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

from rltrain.config import RunConfig
from rltrain.data.mixture import Mixture
from rltrain.data.pass_rates import training_problems
from rltrain.data.sampler import problem_indices, times_before
from rltrain.errors import ConfigError
from rltrain.policy.encode import encode_all, prompt_limit, refuse_long_entries, why_left_out
from rltrain.policy.load import Policy
from rltrain.runtime import dist
from rltrain.types import Problem, Prompt

log = logging.getLogger(__name__)

TRIED = 1000  # problems, before a data set counts as unusable


class PromptSource:
    """``next(step)`` is a pure function of (seed, step): the same on any number of ranks, and after a resume."""

    def __init__(self, config: RunConfig, policy: Policy) -> None:
        self._config = config
        self._policy = policy
        self._limit = prompt_limit(policy, config.sampling)
        self._asked: tuple[int, int] | None = None
        self._answer: tuple[list[Prompt], list[Problem]] = [], []
        self._problems: Sequence[Problem] = training_problems(config.data)
        if len(self._problems) == 0:
            raise ConfigError(
                "data: the training split holds no problem; check the path, the split and the field mapping"
            )
        self._require_a_prompt()

    def _require_a_prompt(self) -> None:
        """Some problem, of up to ``TRIED`` from all over the data, makes a prompt within the limit."""
        size = len(self._problems)
        indices = range(0, size, max(1, size // TRIED))[:TRIED]
        if self._has_handbook():
            dropped = self._encoded([self._problems[index] for index in indices])[1]
            refuse_long_entries(self._policy, dropped, self._config.model, max_prompt_tokens=self._limit)
        if not any(self._encoded([self._problems[index]])[0] for index in indices):
            raise ConfigError(
                f"data: none of {len(indices)} training problems makes a prompt, the first is "
                f"{self._reason(self._problems[0])}"
            )

    def _has_handbook(self) -> bool:
        problems = self._problems
        configs = problems.configs.values() if isinstance(problems, Mixture) else [self._config.data]
        return any(config.handbook is not None for config in configs)

    def _encoded(self, problems: Sequence[Problem]) -> tuple[list[Prompt], list[Problem]]:
        return encode_all(self._policy, problems, self._config.model, max_prompt_tokens=self._limit)

    def _reason(self, problem: Problem) -> str:
        return why_left_out(self._policy, problem, self._config.model, max_prompt_tokens=self._limit)

    def next(self, step: int, *, attempt: int = 0) -> tuple[list[Prompt], list[Problem]]:
        """This rank's prompts, and its problems that were left out because of their length or template."""
        if self._asked != (step, attempt):  # twice in a row, where a step is sampled ahead
            self._asked, self._answer = (step, attempt), self._make(step, attempt)
        return self._answer

    def _make(self, step: int, attempt: int) -> tuple[list[Prompt], list[Problem]]:
        count = self._config.batch.prompts_per_step
        drawn = {"count": count, "seed": self._config.seed, "step": step}
        share = count // dist.world_size()
        mine = slice(dist.rank() * share, (dist.rank() + 1) * share)
        places = [self._places(attempt=each, **drawn) for each in range(attempt + 1)]
        problems = [self._problem(place) for place in places[-1][mine]]
        repeats = times_before(places)[mine]
        prompts, dropped = self._encoded(problems)
        if dropped:
            reason = self._reason(dropped[0])
            log.warning("step %d: %d prompts are left out, the first is %s", step, len(dropped), reason)
        return _numbered(prompts, problems, repeats), dropped

    def _places(self, **drawn: int) -> Sequence[Any]:
        problems = self._problems
        return problems.draw(**drawn) if isinstance(problems, Mixture) else problem_indices(len(problems), **drawn)

    def _problem(self, place: Any) -> Problem:
        return self._problems.at(place) if isinstance(self._problems, Mixture) else self._problems[place]


def _numbered(prompts: Sequence[Prompt], problems: Sequence[Problem], repeats: Sequence[int]) -> list[Prompt]:
    """The prompts, each with the occurrence of its problem; those of problems that were left out are missing."""
    waiting: dict[str, deque[int]] = defaultdict(deque)
    for problem, repeat in zip(problems, repeats, strict=True):
        waiting[problem.id].append(repeat)
    return [dataclasses.replace(prompt, occurrence=waiting[prompt.problem.id].popleft()) for prompt in prompts]
