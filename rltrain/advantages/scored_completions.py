"""Log-probs of whole completions from the scorer, for estimators that compare two models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rltrain.config import RunConfig
from rltrain.errors import require
from rltrain.types import Group, SpanRequest

Score = Callable[[Sequence[SpanRequest]], list[list[Tensor]]]
# A completion, by the index of its group and its own, and the ids it is scored after.
Scored = tuple[int, int, tuple[int, ...]]


def all_completions(groups: Sequence[Group]) -> list[Scored]:
    """Every completion that the policy wrote tokens of, after its own prompt."""
    return [
        (p, g, group.prompt.token_ids)
        for p, group in enumerate(groups)
        for g, completion in enumerate(group.completions)
        if completion.written_tokens
    ]


def logprobs_of(groups: Sequence[Group], wanted: Sequence[Scored], score: Score) -> Iterator[Tensor]:
    """Log-probs of each wanted completion's written tokens, float64 [W], at temperature 1.

    They are those behind all ids before them, an environment's too. All ranks call this together. ``score`` is a method
    of ``context.scorer``.
    """
    requests = []
    for p, g, prompt_ids in wanted:
        completion, start = groups[p].completions[g], len(prompt_ids)
        spans = tuple((start + first, start + stop) for first, stop in completion.written_spans)
        requests.append(SpanRequest(token_ids=prompt_ids + completion.token_ids, spans=spans, prompt_tokens=start))
    return (torch.cat(list(spans)).double() for spans in score(requests))


def zeros_like_completions(groups: Sequence[Group]) -> list[list[Tensor]]:
    """An advantage of 0 for every token, float64."""
    return [[torch.zeros(len(ids), dtype=torch.float64) for ids in group.completion_ids] for group in groups]


def require_whole_distribution(run: RunConfig, name: str) -> None:
    """``ConfigError`` unless completions are sampled from the very distribution that the scorer scores."""
    sampling = run.sampling
    require(
        sampling.temperature == 1 and sampling.top_k == 0 and sampling.top_p == 1,
        f"sampling.temperature={sampling.temperature:g}, top_k={sampling.top_k}, top_p={sampling.top_p:g}: {name} "
        "compares log-probs at temperature 1, which must be those sampled from; set 1, 0 and 1",
    )
