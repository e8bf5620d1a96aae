"""ConMax: what phi thinks of a compressed trace's lines, beside the trace without its redundant lines.

S_think is a mean over tokens. Leaving out a line moves it up if the mean log-prob of the line's tokens lies below
S_think, and down if it lies above (what phi thinks of the lines behind it aside). So a redundant line pays if its mean
log-prob beats S_think.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rltrain.data.traces import TracePrompt
from rltrain.types import Context, Mean, SpanRequest

ScoredTraces = tuple[TracePrompt, Sequence[tuple[int, ...]], Sequence[Sequence[Tensor]]]


def score_request(prompt: TracePrompt, trace_ids: Sequence[int]) -> SpanRequest:
    """Question, compressed trace, answer, in one sequence: without the original trace and the instruction.

    The spans are the trace and the answer. The text around the answer is conditioned on, not scored.
    """
    context = prompt.with_trace(trace_ids) + prompt.before_answer_ids
    start = len(prompt.question_ids)
    return SpanRequest(
        token_ids=context + prompt.answer_ids,
        spans=((start, start + len(trace_ids)), (len(context), len(context) + len(prompt.answer_ids))),
        prompt_tokens=start,
    )


def trace_lines(ids: Sequence[int], tokenizer: Any) -> list[tuple[str, int, int]]:
    """The lines of a trace: text, and the tokens ``ids[start:stop]``, the one that ends the line included."""
    lines, text, start = [], "", 0
    for stop, token in enumerate(ids, start=1):
        text += tokenizer.decode([token])
        if "\n" in text or stop == len(ids):
            lines.append((text.strip(), start, stop))
            text, start = "", stop
    return lines


def redundant(lines: Sequence[str], bare: Sequence[str]) -> list[bool]:
    """Which lines are none of ``bare``, or one of them once more."""
    left, found = Counter(bare), []
    for line in lines:
        found.append(left[line] <= 0)
        left[line] -= 1
    return found


def bare_metrics(scored: Sequence[ScoredTraces], context: Context) -> dict[str, Mean]:
    """Metrics ``compression/…`` of groups whose bare traces are known, {} where there are none.

    ``bare_nll``: mean over the prompts of -S_think of the bare trace, in nats per token. ``redundant_lines``: share
    of the compressed traces' lines that the bare one does not hold. ``redundant_nll``: mean NLL of such a line's
    tokens, in nats, mean over lines. ``redundant_pays``: share of them with a mean log-prob above their trace's
    S_think. All ranks call this together.
    """
    known = [group for group in scored if group[0].bare_ids]
    asked = context.scorer.phi([score_request(prompt, prompt.bare_ids) for prompt, _, _ in known])
    columns: dict[str, list[float]] = {name: [] for name in ("bare_nll", "redundant_lines", "redundant_nll")}
    columns |= {"bare_nll": [-float(trace_T.double().mean()) for trace_T, _ in asked], "redundant_pays": []}
    for prompt, traces, likelihoods in known:
        for ids, (trace_T, _) in zip(traces, likelihoods, strict=True):
            flags, scores = line_scores(ids, trace_T, prompt, context.tokenizer)
            columns["redundant_lines"] += map(float, flags)
            extra = [score for score, flag in zip(scores, flags, strict=True) if flag]
            columns["redundant_nll"] += [-score for score in extra]
            columns["redundant_pays"] += [float(score > float(trace_T.double().mean())) for score in extra]
    return {f"compression/{name}": Mean.of(values) for name, values in columns.items()} if known else {}


def line_scores(
    ids: Sequence[int], trace_T: Tensor, prompt: TracePrompt, tokenizer: Any
) -> tuple[list[bool], list[float]]:
    """Of each line of a compressed trace: whether it is redundant, and the mean log-prob of its tokens."""
    lines = trace_lines(ids, tokenizer)
    bare = [text for text, _, _ in trace_lines(prompt.bare_ids, tokenizer)]
    scores = [float(trace_T[start:stop].double().mean()) for _, start, stop in lines]
    return redundant([text for text, _, _ in lines], bare), scores
