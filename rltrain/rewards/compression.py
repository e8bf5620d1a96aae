"""ConMax: a compressed trace is rewarded by its likelihood and that of the answer (arXiv 2601.04973)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rltrain.advantages.group import group_advantages
from rltrain.config import RewardConfig
from rltrain.data.traces import TracePrompt
from rltrain.errors import ConfigError, require
from rltrain.registry import register
from rltrain.rewards.bare_trace import bare_metrics, score_request
from rltrain.rewards.length import repetition_penalty
from rltrain.types import Completion, Context, Group, Mean, Need, Scores

FLOOR_MARGIN = 1.0
FLOOR_ALONE = -10.0


def compression_reward(
    answer_logprobs: Sequence[Any] | Tensor, trace_logprobs: Sequence[Any] | Tensor, *, beta: float = 1.2
) -> Tensor:
    """``R_i = S_ans + beta·S_think``, float64 [G], in nats per token.

    S_ans is the mean log-prob of the answer's tokens after trace i, S_think that of the trace's tokens. They are not
    exponentiated, and there is no length term. Each argument holds a sequence of log-probs, or their mean, per
    completion.

    An empty sequence marks an output without a usable trace. It gets the floor: the lowest valid reward of the group
    minus 1, or -10 if none is valid.
    """
    answers_G, traces_G = _means(answer_logprobs), _means(trace_logprobs)
    return floored(answers_G + beta * traces_G)


def floored(rewards_G: Tensor) -> Tensor:
    """NaN rewards replaced by the floor: the lowest other reward minus 1, or -10 if there is none."""
    valid = rewards_G[~rewards_G.isnan()]
    floor = float(valid.min()) - FLOOR_MARGIN if len(valid) else FLOOR_ALONE
    return rewards_G.nan_to_num(nan=floor)


def _means(logprobs: Sequence[Any] | Tensor) -> Tensor:
    """Mean of each sequence, NaN if it is empty."""
    means = [torch.as_tensor(values, dtype=torch.float64).detach().mean() for values in logprobs]
    return torch.stack(means) if means else torch.zeros(0, dtype=torch.float64)


@dataclass(kw_only=True)
class CompressionRewardConfig(RewardConfig):
    """See :func:`compression_reward`. Phi is the model of the ``scorer`` group.

    For ablation, both worse in the paper: ``pooled`` takes a single mean over the tokens of answer and trace together.
    ``length_weight`` weighs a term ``(|z| - |z'|)/|z|``. It and the likelihoods are then whitened over the group, so
    that the weight compares equal scales. ``ngram`` is for the metrics.
    """

    beta: float = 1.2  # weight of the trace's likelihood beside the answer's
    pooled: bool = False
    length_weight: float = 0.0
    ngram: int = 8

    def __post_init__(self) -> None:
        require(self.beta >= 0, f"reward.beta={self.beta}: must be >= 0; 0 leaves the trace's own likelihood out")
        require(self.ngram >= 1, f"reward.ngram={self.ngram}: must be >= 1")


def compressed_ids(prompt: TracePrompt, completion: Completion, tokenizer: Any) -> tuple[int, ...]:
    """The sampled ids between the tags. Empty if a tag is missing or doubled, the text blank, or the output cut.

    An environment's ids are left out, and tags in them do not count.
    A token that holds a tag and other text counts as tag.
    """
    opening, closing = prompt.config.opening, prompt.config.closing
    pieces = [tokenizer.decode([token]) for token in completion.written_ids]
    text, ends = "".join(pieces), list(itertools.accumulate(map(len, pieces)))
    prefilled = prompt.config.prefill.rstrip().endswith(opening)
    if completion.finish != "stop" or text.count(closing) != 1 or text.count(opening) != (0 if prefilled else 1):
        return ()
    start = 0 if prefilled else text.index(opening) + len(opening)
    stop = text.index(closing)
    if not text[start:stop].strip():
        return ()
    spans = zip(completion.written_ids, [0, *ends], ends, strict=False)
    return tuple(token for token, begin, end in spans if begin >= start and end <= stop)


@register("reward", "compression", CompressionRewardConfig, needs={Need.SCORER})
def compression(groups: Sequence[Group], config: CompressionRewardConfig, context: Context) -> Scores:
    """The reward of each compressed trace. Outputs without a trace get the floor of their group."""
    prompts = [_trace_prompt(group) for group in groups]
    pairs = list(zip(groups, prompts, strict=True))
    traces = [
        [compressed_ids(prompt, completion, context.tokenizer) for completion in group.completions]
        for group, prompt in pairs
    ]
    requests = [score_request(prompt, ids) for prompt, row in zip(prompts, traces, strict=True) for ids in row if ids]
    scored = iter(context.scorer.phi(requests))
    likelihoods = [[next(scored) if ids else [torch.zeros(0), torch.zeros(0)] for ids in row] for row in traces]
    by_group = list(zip(prompts, traces, likelihoods, strict=True))
    rewards = [_rewards(*group, config) for group in by_group]
    metrics = [_metrics(*group, config, context.tokenizer) for group in by_group]
    metrics.append(bare_metrics([group[:3] for group in by_group], context))
    return Scores(scores=[rewards_G.tolist() for rewards_G in rewards], metrics=_merged(metrics))


def _trace_prompt(group: Group) -> TracePrompt:
    if not isinstance(group.prompt, TracePrompt):
        raise ConfigError(f"rewards: there is no trace to compress in {group.prompt.problem.id}; choose data of traces")
    return group.prompt


def _rewards(
    prompt: TracePrompt,
    trace_ids: Sequence[tuple[int, ...]],
    likelihoods: Sequence[Sequence[Tensor]],
    config: CompressionRewardConfig,
) -> Tensor:
    """Rewards [G] of a group."""
    traces, answers = ([pair[i] for pair in likelihoods] for i in (0, 1))
    if config.pooled:
        rewards_G = floored(_means([torch.cat(pair) for pair in zip(answers, traces, strict=True)]))
    else:
        rewards_G = compression_reward(answers, traces, beta=config.beta)
    if config.length_weight:
        original = len(prompt.trace_ids)
        saved_G = [(original - len(ids)) / original if ids else None for ids in trace_ids]
        usable = torch.tensor([bool(ids) for ids in trace_ids])
        likelihood_G = group_advantages(rewards_G.where(usable, torch.nan))
        rewards_G = likelihood_G + config.length_weight * group_advantages(saved_G)
        # The floor is taken again, so that no trace earns less than an output without a trace.
        rewards_G = floored(rewards_G.where(usable, torch.nan))
    return rewards_G


def overlap(ids: Sequence[int], original: Sequence[int], *, ngram: int) -> float:
    """Share of the n-grams of ``ids`` that are in ``original``. A non-empty sequence below n tokens is one n-gram."""
    n = min(ngram, len(ids))
    grams, known = _ngrams(ids, n), set(_ngrams(original, n))
    return sum(gram in known for gram in grams) / len(grams)


def _ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]


def _metrics(
    prompt: TracePrompt,
    trace_ids: Sequence[tuple[int, ...]],
    likelihoods: Sequence[Sequence[Tensor]],
    config: CompressionRewardConfig,
    tokenizer: Any,
) -> dict[str, Mean]:
    """Copying, repetition and leaks of the answer, which the reward does not see, and its two scores."""
    written = [(ids, pair) for ids, pair in zip(trace_ids, likelihoods, strict=True) if ids]
    answer = prompt.problem.answer
    columns = {
        "length_ratio": [len(ids) / max(1, len(prompt.trace_ids)) for ids, _ in written],
        "overlap": [overlap(ids, prompt.trace_ids, ngram=config.ngram) for ids, _ in written],
        "repeated_ngrams": [-repetition_penalty(ids, ngram=config.ngram, max_penalty=-1.0) for ids, _ in written],
        "states_answer": [float(answer in tokenizer.decode(ids)) for ids, _ in written],
        "trace_score": [float(trace_T.double().mean()) for _, (trace_T, _) in written],
        "answer_score": [float(answer_T.double().mean()) for _, (_, answer_T) in written],
        "floored": [float(not ids) for ids in trace_ids],
    }
    return {f"compression/{name}": Mean.of(values) for name, values in columns.items()}


def _merged(metrics: Sequence[Mapping[str, Mean]]) -> dict[str, Mean]:
    """The metrics of all groups."""
    merged: dict[str, Mean] = {}
    for group in metrics:
        merged |= {name: merged[name] + value if name in merged else value for name, value in group.items()}
    return merged
