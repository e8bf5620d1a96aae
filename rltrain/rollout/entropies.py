"""The service ``context.entropy``: H and collision probability of the sampling distribution at sampled tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rltrain.batching.bins import Layout
from rltrain.config import SamplingConfig
from rltrain.policy.logprobs import inference, logprobs, of_logits, unwrapped
from rltrain.policy.scorer import span_values
from rltrain.rollout.sampling import distribution, entropy_and_collision
from rltrain.runtime import dist
from rltrain.types import Completion, Group, SpanRequest, TokenBatch, TokenEntropy


class SampledEntropies:
    """What the sampler kept, and a pass of ``model`` over completions without it, for ``context.entropy``.

    ``model`` is a ``LogprobModel`` or its engine. The distribution of the pass is that of ``sampling``: temperature,
    top-k, top-p. A whole distribution comes from the kernels, without logits of all tokens. It is the policy as it is
    now, which with ``rollout.ahead`` is a step newer than the one that sampled.
    """

    def __init__(
        self, model: Any, sampling: SamplingConfig, *, token_budget: int, layouts: Sequence[Layout] = ("padded",)
    ) -> None:
        self._model, self._sampling = model, sampling
        self._token_budget, self._layouts = token_budget, layouts

    def __call__(self, groups: Sequence[Group]) -> list[list[TokenEntropy]]:
        """``[p][g]`` is of completion g of group p. All ranks call this together."""
        lacking = [(group, one) for group in groups for one in group.completions if one.entropies is None]
        scored = iter(self._scored([_request(*pair) for pair in lacking]))
        return [
            [
                _token_entropy(_placed(next(scored), one) if one.entropies is None else _kept(one.entropies))
                for one in group.completions
            ]
            for group in groups
        ]

    def _scored(self, requests: Sequence[SpanRequest]) -> list[Tensor]:
        """``[tokens, 2]`` of each, over the ids that the model wrote. No pass where no rank has a request."""
        if not int(dist.all_max(torch.tensor(len(requests)), name="completions without entropies")):
            return []
        with inference(unwrapped(self._model)):
            scored = span_values(
                self._model, requests, token_budget=self._token_budget, layouts=self._layouts, values=self._values
            )
        return [torch.cat([torch.zeros(0, 2), *spans]) for spans in scored]

    def _values(self, model: Any, batch: TokenBatch) -> Tensor:
        sampling = self._sampling
        if not sampling.top_k and sampling.top_p == 1 and not unwrapped(model).own_head:
            head = logprobs(model, batch, collision=True, temperature=sampling.temperature)
            assert head.entropy_N is not None and head.collision_N is not None
            return torch.stack([head.entropy_N, head.collision_N], dim=-1)
        settings = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        return of_logits(model, batch, partial(_of_logits, settings))


def _of_logits(settings: dict[str, Any], logits_NV: Tensor) -> Tensor:
    return entropy_and_collision(distribution(logits_NV, **settings))


def _kept(entropies: Sequence[tuple[float, float]]) -> Tensor:
    return torch.tensor(entropies, dtype=torch.float64).reshape(-1, 2)


def _placed(values_N2: Tensor, completion: Completion) -> Tensor:
    """One row per id: NaN where an environment wrote it."""
    written_T = torch.tensor(completion.written_T, dtype=torch.bool)
    values_T2 = values_N2.new_full((len(written_T), 2), math.nan)
    values_T2[written_T] = values_N2
    return values_T2


def _request(group: Group, completion: Completion) -> SpanRequest:
    prompt = len(group.prompt.token_ids)
    spans = tuple((prompt + start, prompt + stop) for start, stop in completion.written_spans)
    return SpanRequest(token_ids=group.prompt.token_ids + completion.token_ids, spans=spans, prompt_tokens=prompt)


def _token_entropy(values_T2: Tensor) -> TokenEntropy:
    return TokenEntropy(entropy_T=values_T2[:, 0].clone(), collision_T=values_T2[:, 1].clone())
