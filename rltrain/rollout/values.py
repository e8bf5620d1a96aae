"""The service ``context.values``: what the introspection head predicts at each token of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rltrain.batching.bins import Layout
from rltrain.losses.introspection import Grid
from rltrain.policy.logprobs import inference, introspect, unwrapped
from rltrain.policy.scorer import span_values
from rltrain.runtime.introspection import IntrospectionConfig
from rltrain.types import Completion, Group, SpanRequest, TokenBatch


class PredictedValues:
    """Predictions of the policy's own head, in a pass of ``model``, a ``LogprobModel`` or its engine.

    Row t of a completion is of the state before its token t. A sampler has the same numbers in the forward that samples
    the token. All ranks call the methods together.
    """

    def __init__(
        self,
        model: Any,
        config: IntrospectionConfig,
        *,
        token_budget: int,
        layouts: Sequence[Layout] = ("padded",),
    ) -> None:
        self._model, self._grid = model, Grid.of(config)
        self._token_budget, self._layouts = token_budget, layouts

    def __call__(self, groups: Sequence[Group]) -> list[list[Tensor]]:
        """V(s_t) [T] of each completion, float64 on the CPU: the expected reward."""
        return [[self._grid.values(grid_TC).double() for grid_TC in row] for row in self.grids(groups)]

    def joint(self, groups: Sequence[Group]) -> list[list[Tensor]]:
        """p(length bin, reward bin) [T, B, R] of each completion, float64 on the CPU."""
        return [[self._grid.joint(grid_TC.double()) for grid_TC in row] for row in self.grids(groups)]

    def grids(self, groups: Sequence[Group]) -> list[list[Tensor]]:
        """Logits of the grid [T, C] of each completion, fp32 on the CPU."""
        requests = [_request(group, completion) for group in groups for completion in group.completions]
        with inference(unwrapped(self._model)):
            scored = span_values(
                self._model, requests, token_budget=self._token_budget, layouts=self._layouts, values=_grid_logits
            )
        spans = iter(scored)
        return [[next(spans)[0] for _ in group.completions] for group in groups]


def _grid_logits(model: Any, batch: TokenBatch) -> Tensor:
    return introspect(model, batch)


def _request(group: Group, completion: Completion) -> SpanRequest:
    prompt = len(group.prompt.token_ids)
    ids = group.prompt.token_ids + completion.token_ids
    return SpanRequest(token_ids=ids, spans=((prompt, len(ids)),), prompt_tokens=prompt)
