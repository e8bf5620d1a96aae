"""The metrics of a step that belong to no part: lengths, tokens, the sampler's difference from the trainer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rltrain.batching.collate import Denominators
from rltrain.config import BatchConfig
from rltrain.runs.handbook_metrics import handbook_metrics
from rltrain.runs.metrics import Accumulator
from rltrain.runs.turn_metrics import turn_metrics
from rltrain.types import Group, Max, Mean, Metrics, Min, Sum, TokenBatch

CONTINUED_S = "timing_s/continuations"  # a part of the stages in which it was asked for


def sampler_difference(logprobs_N: Tensor, batch: TokenBatch) -> Metrics:
    """How far the sampled log-probs are from the trainer's before the first update, in nats."""
    real_N = batch.weights_N > 0
    if not bool(real_N.any()):
        return {}
    difference_N = (logprobs_N - batch.sampler_logprobs_N)[real_N].abs()
    return {
        "sampling/sampling_logp_difference/mean": Mean.of(difference_N),
        "sampling/sampling_logp_difference/max": Max(value=float(difference_N.max())),
    }


def completion_metrics(groups: Sequence[Group]) -> Metrics:
    """Of all that was sampled, kept or not: lengths, tokens of prompts and completions (``num_tokens``, of this step).

    Lengths and tokens are of all ids of a completion, as ``sampling.max_new_tokens`` limits them. Where an environment
    wrote some of them, ``completions/written_tokens`` is the mean number of those that the model wrote.
    ``entropy/sampled`` is the mean of -log p of the sampled tokens, whose expectation is the entropy of the sampling
    distribution.
    """
    completions = [completion for group in groups for completion in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    written = [completion.written_tokens for completion in completions]
    prompt_tokens = sum(len(group.prompt.token_ids) * len(group.completions) for group in groups)
    metrics = {
        "completions/mean_length": Mean.of(lengths),
        "completions/clipped_ratio": Mean.of([completion.finish == "length" for completion in completions]),
        "completions/tokens": Sum(value=float(sum(lengths))),
        "num_tokens": Sum(value=float(prompt_tokens + sum(lengths))),
        "entropy/sampled": Mean(total=-sum(sum(c.written_logprobs) for c in completions), count=sum(written)),
    }
    if any(completion.turns for completion in completions):
        metrics["completions/written_tokens"] = Mean.of(written)
    if not lengths:
        return metrics
    longest, shortest = Max(value=float(max(lengths))), Min(value=float(min(lengths)))
    metrics |= {"completions/max_length": longest, "completions/min_length": shortest}
    return metrics | handbook_metrics(groups) | turn_metrics(completions)


def kept_metrics(groups: Sequence[Group]) -> Metrics:
    """Of the completions that dynamic sampling kept: ``completions_kept/…``."""
    names = ("completions/mean_length", "completions/clipped_ratio", "completions/tokens")
    metrics = completion_metrics(groups)
    return {name.replace("completions", "completions_kept"): metrics[name] for name in names}


def step_values(
    metrics: Accumulator,
    groups: Sequence[Group],
    denominators: Sequence[Denominators],
    *,
    batch: BatchConfig,
    tokens_before: float,
) -> dict[str, float]:
    """The reduced metrics of a step; ``num_tokens`` counts on from ``tokens_before``.

    ``denominators`` are those of the minibatches; their mean is logged, as that of the losses is. ``clip_ratio/*`` are
    shares of all tokens that carry loss: a token of a row that was left out has an advantage of 0, which no clip cuts.
    """
    if batch.dynamic_sampling:
        metrics.add(kept_metrics(groups))
    values = metrics.reduce()
    step_s = sum(metrics.timing_s.values())
    trained = values["policy_tokens"] / (batch.update_epochs * sum(each.tokens for each in denominators))
    return values | {
        **{name: values[name] / batch.updates for name in ("loss", "policy_tokens")},
        **{name: values[name] * trained for name in values if name.startswith("clip_ratio/")},
        "num_tokens": tokens_before + values["num_tokens"],
        "loss_denominator/tokens": sum(each.tokens for each in denominators) / len(denominators),
        "loss_denominator/rows": sum(each.rows for each in denominators) / len(denominators),
        "timing_s/step": step_s,
        "perf/throughput": values["completions/tokens"] / step_s,
        **({"continuations/share": values[CONTINUED_S] / step_s} if CONTINUED_S in values else {}),
    }
