"""What a tabular policy gives an estimator besides groups: every service, from the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from rltrain.compare.gradients.families import EOS, VOCABULARY, Family, TabularPolicy
from rltrain.rollout.continuation_types import ContinuationRequest, ContinuationSampling
from rltrain.rollout.probe_types import ProbeRequest, ProbeResult, ProbeSettings
from rltrain.types import (
    Completion,
    Context,
    Group,
    Need,
    RolloutServices,
    SpanRequest,
    TokenEntropy,
    Turn,
    turns_before,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROVIDED = frozenset({Need.PROBES, Need.CONTINUATIONS, Need.ENTROPY, Need.SCORER, Need.STATE, Need.REFERENCE_LOGPROBS})
PROVIDED |= {Need.VALUES}
TEACHER_TEMPERATURE = 0.2


@dataclass(frozen=True, kw_only=True)
class Table:
    """The services of a policy for one estimator: what it draws and keeps lasts from call to call."""

    policy: TabularPolicy
    seed: int

    @cached_property
    def continuer(self) -> TableContinuer:
        return TableContinuer(policy=self.policy, generator=np.random.default_rng([self.seed, 2]))

    @cached_property
    def context(self) -> Context:
        """The context of the estimator's calls, with every service of ``PROVIDED``."""
        family, state = self.policy.family, {}
        return Context(
            tokenizer=cast("PreTrainedTokenizerBase", StepTokenizer(family=family)),
            rollout=RolloutServices(prober=ExactProber(policy=self.policy), continuer=self.continuer),
            scorer=TableScorer(student=self.policy, teacher=teacher_of(self.policy)),
            entropy=ExactEntropies(policy=self.policy),
            values=lambda groups: exact_values(self.policy, groups),
            grade=lambda groups: graded(self.policy, groups),
            encode=lambda prompt: (1,),
            state_of=lambda part: state,
            max_new_tokens=family.length,
        )


@dataclass(frozen=True, kw_only=True)
class StepTokenizer:
    """The little of a tokenizer that estimators use, over the text of a family."""

    family: Family

    def __len__(self) -> int:
        return VOCABULARY

    @property
    def all_special_ids(self) -> list[int]:
        return [] if self.family.eos_from is None else [EOS]

    def batch_decode(self, ids: Sequence[Sequence[int]], **options: Any) -> list[str]:
        """The text of each row of ids."""
        return [self.family.text(row) for row in ids]

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """Any text is one token: probes are answered from the table, not from text."""
        return {"input_ids": [1]}


@dataclass(frozen=True, kw_only=True)
class ExactProber:
    """Probes without noise: accuracy is the exact value V of the prefix, confidence exp(-entropy of right or wrong)."""

    policy: TabularPolicy
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], ProbeResult] = field(default_factory=dict)

    def probe(self, requests: Sequence[ProbeRequest], settings: ProbeSettings) -> list[ProbeResult]:
        """One result per request, in order."""
        return [self._result(request.completion_ids, request.cuts) for request in requests]

    def _result(self, ids: tuple[int, ...], cuts: tuple[int, ...]) -> ProbeResult:
        if (ids, cuts) not in self.known:
            accuracy_K = torch.tensor([self.policy.values[ids[:cut]] for cut in cuts], dtype=torch.float64).clamp(0, 1)
            entropy_K = -torch.xlogy(accuracy_K, accuracy_K) - torch.xlogy(1 - accuracy_K, 1 - accuracy_K)
            self.known[ids, cuts] = ProbeResult(accuracy_K=accuracy_K, confidence_K=(-entropy_K).exp())
        return self.known[ids, cuts]


@dataclass(frozen=True, kw_only=True)
class ExactEntropies:
    """Entropy and collision probability of the table's row before each token; NaN where an environment wrote it."""

    policy: TabularPolicy
    known: dict[tuple[int, ...], TokenEntropy] = field(default_factory=dict)

    def __call__(self, groups: Sequence[Group]) -> list[list[TokenEntropy]]:
        """``[p][g]``, float64."""
        return [[self.of(ids) for ids in group.completion_ids] for group in groups]

    def of(self, ids: tuple[int, ...]) -> TokenEntropy:
        """Of one completion."""
        if ids not in self.known:
            rows_WV = torch.from_numpy(self.policy.policy_SV[self.policy.states(ids)])
            pair = -torch.xlogy(rows_WV, rows_WV).sum(1), rows_WV.square().sum(1)
            entropy_T, collision_T = (torch.from_numpy(self.policy.laid_out(ids, values.numpy())) for values in pair)
            self.known[ids] = TokenEntropy(entropy_T=entropy_T, collision_T=collision_T)
        return self.known[ids]


def exact_values(policy: TabularPolicy, groups: Sequence[Group]) -> list[list[Tensor]]:
    """V of the prefix before each token, as a head without error would predict; NaN where an environment wrote it."""

    def of(ids: tuple[int, ...]) -> Tensor:
        written = [policy.values[ids[:t]] for t in range(len(ids)) if ids[:t] in policy.state_of]
        return torch.from_numpy(policy.laid_out(ids, np.array(written)))

    return [[of(ids) for ids in group.completion_ids] for group in groups]


@dataclass(frozen=True, kw_only=True)
class TableContinuer:
    """Continuations drawn from the table. ``tokens[0]`` counts what was drawn."""

    policy: TabularPolicy
    generator: np.random.Generator
    tokens: list[int] = field(default_factory=lambda: [0])
    tables: dict[ContinuationSampling, TabularPolicy] = field(default_factory=dict)
    endings: dict[Any, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    known: dict[Any, Completion] = field(default_factory=dict)

    def continue_(self, requests: Sequence[ContinuationRequest]) -> list[list[Completion]]:
        """``draws`` independent ones per request. A whole completion goes on with nothing."""
        return [self._drawn(request) for request in requests]

    def _drawn(self, request: ContinuationRequest) -> list[Completion]:
        policy = self._table(request.sampling)
        completions_K, cumulative_K = self._endings(policy, request)
        picked = np.searchsorted(cumulative_K, self.generator.random(request.draws) * cumulative_K[-1], side="right")
        return [self._cut(policy, request, policy.completions[completions_K[k]]) for k in picked]

    def _table(self, sampling: ContinuationSampling | None) -> TabularPolicy:
        if sampling is None:
            return self.policy
        if sampling not in self.tables:
            self.tables[sampling] = sharpened(self.policy, sampling)
        return self.tables[sampling]

    def _endings(self, policy: TabularPolicy, request: ContinuationRequest) -> tuple[np.ndarray, np.ndarray]:
        """The completions that begin with the state, and their probabilities, added up."""
        key = request.completion_ids, request.sampling
        if key not in self.endings:
            ids, count = request.completion_ids, len(request.completion_ids)
            fits = np.array([c for c, whole in enumerate(policy.completions) if whole[:count] == ids])
            self.endings[key] = fits, policy.probability_C[fits].cumsum()
        return self.endings[key]

    def _cut(self, policy: TabularPolicy, request: ContinuationRequest, whole: tuple[int, ...]) -> Completion:
        start, stop = request.position, request.position + request.max_new_tokens
        key = whole, start, stop, request.sampling
        if key not in self.known:
            self.known[key] = Completion(
                token_ids=whole[start:stop],
                logprobs=tuple(policy.logprobs(whole)[start:stop].tolist()),
                finish="stop" if stop >= len(whole) else "length",
                text=policy.family.text(whole[start:stop]),
                turns=turns_behind(turns_before(policy.family.turns(whole), stop), start),
            )
        self.tokens[0] += self.known[key].written_tokens
        return self.known[key]


def turns_behind(turns: Sequence[Turn], position: int) -> tuple[Turn, ...]:
    """The turns of the ids behind the first ``position``, the next of which is a written one."""
    left = []
    for turn in turns:
        if position < turn.written:
            left.append(replace(turn, written=turn.written - position))
        position = max(0, position - turn.written - turn.observed)
    return tuple(left)


def sharpened(policy: TabularPolicy, sampling: ContinuationSampling) -> TabularPolicy:
    """The table under a temperature, top-p and top-k."""
    rows_SV = policy.policy_SV ** (1 / max(sampling.temperature, 1e-3))
    rows_SV = rows_SV / rows_SV.sum(1, keepdims=True)
    order_SV = np.argsort(-rows_SV, axis=1, kind="stable")
    sorted_SV = np.take_along_axis(rows_SV, order_SV, axis=1)
    kept_SV = sorted_SV.cumsum(1) - sorted_SV < sampling.top_p  # the first always is
    if sampling.top_k:
        kept_SV[:, sampling.top_k :] = False
    np.put_along_axis(rows_SV, order_SV, sorted_SV * kept_SV, axis=1)
    return policy.with_rows(rows_SV / rows_SV.sum(1, keepdims=True))


def graded(policy: TabularPolicy, groups: Sequence[Group]) -> list[Group]:
    """The groups with the family's reward; a completion that was cut has 0."""
    scored = []
    for group in groups:
        rewards_G = torch.tensor([policy.reward_of.get(ids, 0.0) for ids in group.completion_ids], dtype=torch.float64)
        scored.append(replace(group, rewards_G=rewards_G, reward_parts={"reward": rewards_G}))
    return scored


def teacher_of(policy: TabularPolicy) -> TabularPolicy:
    """A better policy: pi(a|s)·exp(Q(s, a)/0.2), normalised, the best within a KL penalty of 0.2."""
    value_SV = np.zeros_like(policy.policy_SV)
    for state, index in policy.state_of.items():
        for token in np.flatnonzero(policy.policy_SV[index]).tolist():
            value_SV[index, token] = policy.values[(*state, token)]
    weights_SV = policy.policy_SV * np.exp(value_SV / TEACHER_TEMPERATURE)
    return policy.with_rows(weights_SV / weights_SV.sum(1, keepdims=True))


@dataclass(frozen=True, kw_only=True)
class TableScorer:
    """Log-probs of the sampling policy, which is the initial one, too; phi is the teacher, whatever the prompt."""

    student: TabularPolicy
    teacher: TabularPolicy

    def policy(self, requests: Sequence[SpanRequest]) -> list[list[Tensor]]:
        return [_spans(self.student, request) for request in requests]

    def reference(self, requests: Sequence[SpanRequest]) -> list[list[Tensor]]:
        return self.policy(requests)

    def phi(self, requests: Sequence[SpanRequest]) -> list[list[Tensor]]:
        return [_spans(self.teacher, request) for request in requests]

    def entropies(self, requests: Sequence[SpanRequest]) -> list[list[Tensor]]:
        exact = ExactEntropies(policy=self.student)
        return [_cut(exact.of(_completion_ids(request)).entropy_T, request) for request in requests]


def _completion_ids(request: SpanRequest) -> tuple[int, ...]:
    return request.token_ids[request.prompt_tokens :]


def _spans(policy: TabularPolicy, request: SpanRequest) -> list[Tensor]:
    return _cut(torch.from_numpy(policy.logprobs(_completion_ids(request))), request)


def _cut(values_T: Tensor, request: SpanRequest) -> list[Tensor]:
    first = request.prompt_tokens
    return [values_T[start - first : stop - first] for start, stop in request.spans]
