"""Completions over turns with any engine: the model writes, an environment answers, and the answer becomes ids.

The local engine keeps its rows going while others wait (:mod:`rltrain.rollout.local`). Any other is asked in rounds: a
round continues every completion that goes on, by one turn, from its ids. What was sampled is never tokenised again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from rltrain.config import EnvironmentConfig, ModelConfig, SamplingConfig
from rltrain.errors import RunError
from rltrain.rollout import Rollout
from rltrain.rollout.continuation_types import ContinuationRequest, ContinuationSampling, OneTurn
from rltrain.rollout.continuations import check_requests, draw_key, sampling_of
from rltrain.rollout.conversation import Answers, Conversation, TurnRules, begin, carry
from rltrain.rollout.local import LocalRollout
from rltrain.rollout.observations import Observer, check_texts
from rltrain.rollout.probe_types import ProbeRequest, ProbeResult, ProbeSettings
from rltrain.rollout.rows import Job, Row
from rltrain.rollout.sampling import row_key
from rltrain.rollout.stopping import StopRule
from rltrain.rollout.vllm import VllmRollout
from rltrain.runtime import dist
from rltrain.types import Completion, Group, Prompt


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a state lies: behind ``earlier`` whole turns and the first ``begun`` ids of another.

    ``texts`` are those that the environment answered; what failed left its state as it was.
    """

    earlier: int
    begun: int
    texts: tuple[str, ...]


def place_of(request: ContinuationRequest) -> Place:
    """``RunError`` for a request that does not say its problem, or whose state no written id follows."""
    name = f"continuation of problem {request.problem_id}, sample {request.sample_index}"
    if request.problem is None:
        raise RunError(
            f"{name}: an environment answers the turns, and the request does not say of which problem; give "
            "ContinuationRequest problem=group.prompt.problem and turns=completion.turns"
        )
    left, earlier = request.position, 0
    for turn in request.turns:
        size = turn.written + turn.observed
        if left < size or (earlier + 1 == len(request.turns) and not turn.observed):
            break
        left, earlier = left - size, earlier + 1
    if earlier < len(request.turns) and request.turns[earlier].observed and left >= request.turns[earlier].written:
        raise RunError(
            f"{name}: an environment wrote the id behind its first {request.position}; ask for states that the "
            "model goes on from (Completion.written_spans)"
        )
    texts = tuple(turn.text for turn in request.turns[:earlier] if not turn.failure)
    return Place(earlier=earlier, begun=left, texts=texts)


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
        check_texts((*answers.environment.stop, *config.texts()), policy.tokenizer)
        self._observer = Observer.of(policy.tokenizer, answers.environment.role, model)

    @property
    def engine(self) -> Rollout:
        """What samples."""
        return self._engine

    @property
    def answers(self) -> Answers:
        """Who answers."""
        return self._answers

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
        if isinstance(self._engine, LocalRollout):
            self._engine.sample(jobs, sampling, self._answers)
        else:
            self._in_rounds(jobs, [sampling] * len(jobs), step=step)
        self._settle(row for job in jobs for row in job.rows)
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

    def _settle(self, rows: Iterable[Row]) -> None:
        """Take in what is still under way, such as the first state of a completion that never asked."""
        carry([row.conversation for row in rows if row.conversation is not None], self._answers, wait=True)

    def _in_rounds(self, jobs: Sequence[Job], samplings: Sequence[SamplingConfig], *, step: int) -> None:
        """Every turn of every row by the engine's continuations; all ranks make as many rounds."""
        open_ones = [(job, row, sampling) for job, sampling in zip(jobs, samplings, strict=True) for row in job.rows]
        with self._engine.awake() if isinstance(self._engine, VllmRollout) else nullcontext():
            while int(dist.all_max(torch.tensor(len(open_ones)), name="completions that go on")):
                requests = [_request(*each) for each in open_ones]
                for (_, row, _), (new,) in zip(open_ones, self._engine.continue_(requests, step=step), strict=True):
                    row.extend(new.token_ids, [(logprob,) for logprob in new.logprobs])
                waiting = [row for _, row, _ in open_ones if row.waits]
                self._settle(waiting)
                for row in waiting:
                    row.observe()
                open_ones = [each for each in open_ones if not each[1].done]

    def continue_(self, requests: Sequence[ContinuationRequest], *, step: int) -> list[list[Completion]]:
        """Continuations to the end of the conversation, whose state is made again from the texts of the turns before.

        All ranks call this together, also without a request.
        """
        check_requests(requests, self._sampling, StopRule.of(self._policy, self._sampling))
        places = [place_of(request) for request in requests]
        states = self._states(requests, places)
        rows = [
            [self._continued_row(request, step, draw, place, state) for draw in range(request.draws)]
            for request, place, state in zip(requests, places, states, strict=True)
        ]
        if isinstance(self._engine, LocalRollout):
            self._engine.sample_continued(requests, rows, self._answers)
        else:
            jobs = [Job(prompt_ids=request.prefix_ids, rows=some) for request, some in zip(requests, rows, strict=True)]
            self._in_rounds(jobs, [sampling_of(request, self._sampling) for request in requests], step=step)
        self._settle(row for some in rows for row in some)
        return [[row.completion() for row in some] for some in rows]

    def _states(self, requests: Sequence[ContinuationRequest], places: Sequence[Place]) -> list[Conversation]:
        """The conversation at the begin of the turn of each request, replayed once where several are alike."""
        rules = self._rules(self._sampling)
        keys = [
            (request.problem_id, place.texts, place.earlier) for request, place in zip(requests, places, strict=True)
        ]
        alike = dict(zip(keys, zip(requests, places, strict=True), strict=True))
        problems = [request.problem for request, _ in alike.values() if request.problem is not None]
        begun = [talk for (talk,) in begin(rules, self._answers, problems, [1] * len(problems))]
        for talk, (_, place) in zip(begun, alike.values(), strict=True):
            talk.replayed, talk.earlier = list(place.texts), place.earlier
        carry(begun, self._answers, wait=True)
        state_of = dict(zip(alike, begun, strict=True))
        return [state_of[key] for key in keys]

    def _continued_row(
        self, request: ContinuationRequest, step: int, draw: int, place: Place, state: Conversation
    ) -> Row:
        rules = dataclasses.replace(self._rules(self._sampling), most_tokens=request.position + request.max_new_tokens)
        begun = request.completion_ids[request.position - place.begun :]
        of_turn = rules.of_turn(request.position - place.begun)
        return Row(
            key=draw_key(self._seed, step, request, draw),
            rule=of_turn.after(begun, max_new_tokens=of_turn.max_new_tokens - place.begun),
            conversation=state.fork(rules, begun),
            offset=request.position,
        )


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
