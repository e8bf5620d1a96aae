"""What a tabular policy gives an estimator besides groups: exact answers in the place of sampled ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from rltrain.compare.gradients.families import VOCABULARY, Family, TabularPolicy
from rltrain.rollout.probe_types import ProbeRequest, ProbeResult, ProbeSettings
from rltrain.types import Context, Need, RolloutServices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROVIDED = frozenset({Need.PROBES, Need.STATE})


def context_of(policy: TabularPolicy) -> Context:
    """The context of an estimator's call, with every service of ``PROVIDED``."""
    family = policy.family
    return Context(
        tokenizer=cast("PreTrainedTokenizerBase", StepTokenizer(family=family)),
        rollout=RolloutServices(prober=ExactProber(policy=policy)),
        max_new_tokens=family.length,
    )


@dataclass(frozen=True, kw_only=True)
class StepTokenizer:
    """The little of a tokenizer that estimators use, over the text of a family."""

    family: Family

    def __len__(self) -> int:
        return VOCABULARY

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
