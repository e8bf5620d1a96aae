"""What the counts of a step cover, by hand."""

import dataclasses

import pytest
import torch
from advantage_groups import make_group

from rltrain.batching.collate import Denominators
from rltrain.config import BatchConfig
from rltrain.evaluate import group_metrics
from rltrain.rewards.scoring import answers_differ
from rltrain.runs.metrics import Accumulator, read_jsonl
from rltrain.runs.step_metrics import completion_metrics, step_values
from rltrain.types import Mean, Sum

SAMPLED = [make_group([[1, 2, 3], [4]], [1.0, 0.0]), make_group([[5, 6], [7, 8]], [1.0, 1.0])]


def with_logprobs(group, value):
    completions = tuple(dataclasses.replace(one, logprobs=(value,) * len(one.token_ids)) for one in group.completions)
    return dataclasses.replace(group, completions=completions)


def reduced(*, kept, clipped, trained, update_epochs=1, dynamic_sampling=True):
    metrics = Accumulator()
    metrics.timing_s["train"] = 2.0
    metrics.add(completion_metrics([with_logprobs(group, -0.5) for group in SAMPLED]))
    metrics.add({"loss": Sum(value=1.0), "policy_tokens": Sum(value=trained)})
    metrics.add({"clip_ratio/high_mean": Mean(total=clipped, count=trained)})
    batch = BatchConfig(dynamic_sampling=dynamic_sampling, update_epochs=update_epochs)
    return step_values(metrics, kept, [Denominators(rows=2, tokens=4)], batch=batch, tokens_before=100.0)


def test_all_that_was_sampled_is_counted_and_the_kept_apart():
    """8 tokens in 4 completions, of which 4 in 2 were kept; each prompt has one token: 8 + 4 = 12 tokens."""
    values = reduced(kept=SAMPLED[:1], clipped=1, trained=4)
    assert values["num_tokens"] == 112
    assert (values["completions/mean_length"], values["completions_kept/mean_length"]) == (2.0, 2.0)
    assert (values["completions/tokens"], values["completions_kept/tokens"]) == (8.0, 4.0)
    assert (values["completions/max_length"], values["completions/min_length"]) == (3, 1)
    assert values["perf/throughput"] == 4.0
    assert values["entropy/sampled"] == 0.5
    assert "completions_kept/tokens" not in reduced(kept=SAMPLED, clipped=0, trained=4, dynamic_sampling=False)


@pytest.mark.parametrize("epochs", [1, 2])
def test_clip_shares_are_of_all_tokens_that_carry_loss(epochs):
    """Of the minibatch's 4 tokens 3 were forwarded and 1 was clipped, in every epoch: a quarter, not a third."""
    values = reduced(kept=SAMPLED[:1], clipped=epochs, trained=3 * epochs, update_epochs=epochs)
    assert values["clip_ratio/high_mean"] == pytest.approx(1 / 4)


def judged(answers, penalties, *, names=("answer", "overlong")):
    parts = {name: torch.tensor(row) for name, row in zip(names, (answers, penalties), strict=True)}
    total = [a + p for a, p in zip(answers, penalties, strict=True)]
    return dataclasses.replace(make_group([[1]] * len(total), total), reward_parts=parts)


@pytest.mark.parametrize(("group", "kept"), [
    (judged([1.0, 1.0, 1.0], [0.0, -0.5, -1.0]), False),  # all right, of different lengths
    (judged([0.0, 1.0, 1.0], [0.0, -1.0, -1.0]), True),  # equal totals, unequal answers
    (judged([torch.nan, torch.nan], [0.0, -1.0]), False),  # the total abstains as well
    (judged([1.0, 0.0], [torch.nan, 0.0]), False),  # a single completion counts
    (judged([0.0, -1.0], [1.0, 1.0], names=("overlong", "answer")), False),  # by name, not by place
    (make_group([[1], [2]], [1.0, 0.0]), True),  # no parts: the total
])  # fmt: skip
def test_dynamic_sampling_looks_at_the_answers(group, kept):
    assert answers_differ(group) is kept


def test_abstentions_are_neither_right_nor_wrong():
    """1 of 3 judged: accuracy 1/3, abstained 1/4, pass@2 = 1 - C(2,2)/C(3,2) = 2/3; pass@4 needs 4."""
    group = make_group([[1]] * 4, [1.0, 0.0, 0.0, None])
    right = torch.tensor([1.0, 0.0, 0.0, torch.nan])
    metrics = group_metrics(dataclasses.replace(group, right_G=right), samples=4)
    assert (metrics["accuracy"].total, metrics["accuracy"].count) == (1, 3)
    assert (metrics["abstained"].total, metrics["abstained"].count) == (1, 4)
    assert metrics["pass@2"].total == pytest.approx(2 / 3)
    assert "pass@4" not in metrics


def test_older_runs_are_read_by_the_names_of_now(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "entropy": 0.5}\n')
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "entropy/trained": 0.5}]
