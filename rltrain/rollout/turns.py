"""Completions over turns with any engine: the model writes, an environment answers, and the answer becomes ids.

The local engine keeps its rows going while others wait (:mod:`rltrain.rollout.local`). Any other is asked in rounds: a
round continues every completion that goes on, by one turn, from its ids. What was sampled is never tokenised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rltrain.config import EnvironmentConfig, ModelConfig, SamplingConfig
from rltrain.rollout import Rollout
from rltrain.rollout.continuation_types import ContinuationRequest, ContinuationSampling, OneTurn
from rltrain.rollout.conversation import Answers, Conversation, TurnRules, begin, carry
from rltrain.rollout.local import LocalRollout
from rltrain.rollout.observations import Observer
from rltrain.rollout.probe_types import ProbeRequest, ProbeResult, ProbeSettings
from rltrain.rollout.rows import Job, Row
from rltrain.rollout.sampling import row_key
from rltrain.rollout.stopping import StopRule
from rltrain.runtime import dist
from rltrain.types import Completion, Group, Prompt


class TurnRollout:
    """An engine around ``engine`` whose completions are conversations with the environment of ``answers``.

    The keys of the draws are those of a completion without turns, and a token's position counts all ids before it.
    """

    def __init__(
        self,
        engine: Rollout,
        answers: Answers,
        config: EnvironmentConfig,
        sampling: SamplingConfig,
        policy: Any,
        *,
        model: ModelConfig,
        seed: int,
    ) -> None:
        self._engine, self._answers, self._config, self._sampling = engine, answers, config, sampling
        self._policy, self._seed = policy, seed
        self._observer = Observer.of(policy.tokenizer, answers.environment.role, model)

    @property
    def engine(self) -> Rollout:
        """What samples."""
        return self._engine

    @property
    def same_distribution(self) -> bool:
        """That of the engine."""
        return self._engine.same_distribution

    @property
    def uses_policy(self) -> bool:
        """That of the engine."""
        return self._engine.uses_policy

    def sync(self, policy: Any) -> None:
        """Give the engine the policy's weights."""
        self._engine.sync(policy)

    def probe(self, requests: Sequence[ProbeRequest], settings: ProbeSettings) -> list[ProbeResult]:
        """Those of the engine: a probe is within a turn."""
        return self._engine.probe(requests, settings)

    def generate(
        self, prompts: Sequence[Prompt], *, step: int, group_size: int, sampling: SamplingConfig | None = None
    ) -> list[Group]:
        """``group_size`` conversations about each prompt, in the order of ``prompts``; rewards are not set."""
        sampling = sampling or self._sampling
        problems = [prompt.problem for prompt in prompts]
        talks = begin(self._rules(sampling), self._answers, problems, [group_size] * len(prompts))
        jobs = [
            Job(prompt_ids=prompt.token_ids, rows=[self._row(prompt, step, g, talk) for g, talk in enumerate(some)])
            for prompt, some in zip(prompts, talks, strict=True)
        ]
        self._sample(jobs, sampling, step=step)
        return [
            Group(prompt=prompt, completions=tuple(row.completion() for row in job.rows))
            for prompt, job in zip(prompts, jobs, strict=True)
        ]

    def _rules(self, sampling: SamplingConfig) -> TurnRules:
        rule = StopRule.of(self._policy, sampling)
        return TurnRules.of(self._config, self._answers.environment, self._observer, rule)

    def _row(self, prompt: Prompt, step: int, sample: int, talk: Conversation) -> Row:
        keeps = isinstance(self._engine, LocalRollout) and self._engine.keeps_entropies
        return Row(
            key=row_key(self._seed, step, prompt.problem.id, sample, prompt.occurrence),
            rule=talk.rules.of_turn(0),
            conversation=talk,
            entropies=[] if keeps else None,
        )

    def _sample(self, jobs: Sequence[Job], sampling: SamplingConfig, *, step: int) -> None:
        """Sample all rows to their ends, and take in what is still under way."""
        if isinstance(self._engine, LocalRollout):
            self._engine.sample(jobs, sampling, self._answers)
        else:
            self._in_rounds(jobs, sampling, step=step)
        talks = [row.conversation for job in jobs for row in job.rows if row.conversation is not None]
        carry(talks, self._answers, wait=True)

    def _in_rounds(self, jobs: Sequence[Job], sampling: SamplingConfig, *, step: int) -> None:
        """Every turn of every row by the engine's continuations; all ranks make as many rounds."""
        rows = [(job, row) for job in jobs for row in job.rows]
        while int(dist.all_max(torch.tensor(len(rows)), name="completions that go on")):
            asked = [(job, row) for job, row in rows if not row.done]
            requests = [_request(job, row, sampling) for job, row in asked]
            for (_, row), (new,) in zip(asked, self._engine.continue_(requests, step=step), strict=True):
                row.extend(new.token_ids, [(logprob,) for logprob in new.logprobs])
            waiting = [row for _, row in rows if row.waits]
            carry([row.conversation for row in waiting if row.conversation is not None], self._answers, wait=True)
            for row in waiting:
                row.observe()
            rows = [(job, row) for job, row in rows if not row.done]

    def continue_(self, requests: Sequence[ContinuationRequest], *, step: int) -> list[list[Completion]]:
        """Those of the engine."""
        return self._engine.continue_(requests, step=step)


def _request(job: Job, row: Row, sampling: SamplingConfig) -> ContinuationRequest:
    """The rest of a row's present turn."""
    return ContinuationRequest(
        problem_id="",
        sample_index=0,
        prompt_ids=tuple(job.prompt_ids),
        completion_ids=tuple(row.token_ids),
        draws=1,
        max_new_tokens=row.rule.max_new_tokens,
        sampling=ContinuationSampling(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k),
        one_turn=OneTurn(key=row.key, rule=row.rule, position=row.offset + len(row.token_ids)),
    )
