"""Layouts: packed rows and shared prompts give the gradient of every sequence alone; bins, shares and costs."""

import copy
import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from collated import group
from packed_models import assert_close, batches_of, groups_and_advantages, tiny
from tiny_run import config

from rltrain import trainer, update
from rltrain.batching.bins import (
    CPU,
    CUDA,
    attention_calls,
    equal_shares,
    first_fit_decreasing,
    karmarkar_karp,
    packed_work,
    padded_work,
)
from rltrain.batching.collate import collate
from rltrain.config import BatchConfig
from rltrain.errors import ConfigError
from rltrain.loss import policy_loss
from rltrain.losses.surrogate import SurrogateConfig
from rltrain.policy import packed_attention
from rltrain.policy.capabilities import cannot_pack
from rltrain.policy.layout_check import differences, usable_layouts
from rltrain.policy.logprobs import LogprobModel, micro_batch_loss
from rltrain.runtime import dist

ROOT = Path(__file__).parents[3]


def gradients(model, batches, config):
    """By parameter, from all the micro-batches, and the losses' sum."""
    model.zero_grad()
    wrapped, total = LogprobModel(model, temperature=0.7), 0.0
    for batch in batches:
        output = micro_batch_loss(wrapped, batch, config)
        output.loss.backward()
        total += output.loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def plain_gradients(model, batches, config):
    """One plain forward per sequence, nothing of ours but the loss; ``batches`` are padded ones."""
    model.zero_grad()
    for batch in batches:
        bounds = batch.boundaries_S1.tolist()
        logits = [model(batch.input_ids_L[a:b][None]).logits[0] for a, b in itertools.pairwise(bounds)]
        logprobs_LV = (torch.cat(logits) / 0.7).log_softmax(-1)
        logprobs_N = logprobs_LV[batch.source_N, batch.targets_N]
        entropy_N = -(logprobs_LV.exp() * logprobs_LV).sum(-1)[batch.source_N]
        policy_loss(logprobs_N, batch, config, entropy_N=entropy_N).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# transformers takes Gemma 2's softmax in fp32 in whatever precision the model is.
@pytest.mark.parametrize(
    ("name", "atol"),
    [("Llama", 1e-10), ("Qwen3", 1e-10), ("Gemma", 1e-10), ("Gemma3", 1e-10), ("Gemma2", 1e-5), ("Mistral", 1e-10),
     ("GPT2", 1e-10)],
)  # fmt: skip
def test_gradients_of_every_layout_are_those_of_each_sequence_alone(name, atol):
    model, config = tiny(name).eval(), SurrogateConfig(entropy_coef=0.1)
    assert cannot_pack(model) is None
    expected = plain_gradients(model, batches_of("padded"), config)
    assert max(value.abs().max() for value in expected.values()) > 0.01
    for layout, budget in itertools.product(("padded", "packed", "shared"), (400, 22)):
        batches = batches_of(layout, budget=budget)
        assert (len(batches) > 2) == (budget == 22)
        assert_close(gradients(model, batches, config)[1], expected, atol)


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_gradient_checkpointing_attends_the_same_way_again(layout):
    model, config = tiny("Llama"), SurrogateConfig()
    batches = batches_of(layout)
    expected = gradients(model, batches, config)[1]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_close(gradients(model.train(), batches, config)[1], expected, 1e-12)


def test_sequence_ratios_in_every_layout():
    """GSPO: a prompt that is shared is no sequence of its own in the loss."""
    model, config = tiny("Qwen3"), SurrogateConfig(ratio="sequence", clip_low=3e-4, clip_high=4e-4)
    total, expected = gradients(model, batches_of("padded"), config)
    for layout in ("packed", "shared"):
        found_total, found = gradients(model, batches_of(layout), config)
        assert found_total == pytest.approx(total, abs=1e-7)
        assert_close(found, expected, 1e-10)


@pytest.mark.parametrize(("name", "reason"), [
    ("GptOss", "attention sinks"), ("Mamba", "not dispatched"), ("Bloom", "not dispatched"),
])  # fmt: skip
def test_models_whose_attention_cannot_are_named(name, reason):
    assert reason in cannot_pack(tiny(name))


def test_the_check_passes_models_that_pack_and_stops_those_that_do_not(caplog):
    """A model that counts positions by itself can be packed, as its positions are relative, but not share prompts."""
    model = LogprobModel(tiny("Llama").float(), temperature=1.0)
    assert all(apart.nats < 1e-6 for apart in differences(model, ["padded", "packed", "shared"]).values())
    assert usable_layouts("auto", [model]) == ("padded", "packed", "shared")
    assert usable_layouts("shared", [model]) == ("shared",)
    assert not caplog.records
    counting = tiny("Llama").float()
    counting.model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {"position_ids": torch.arange(args[0].shape[1])[None]}), with_kwargs=True
    )
    wrong = LogprobModel(counting, temperature=1.0)
    assert usable_layouts("auto", [model, wrong]) == ("padded", "packed")
    assert usable_layouts("shared", [model, wrong]) == ("padded",)
    assert "in layout shared the log-probs of LlamaForCausalLM are" in caplog.text
    assert usable_layouts("packed", [LogprobModel(tiny("GptOss").float(), temperature=1.0)]) == ("padded",)
    assert "batch.packing=packed: no layout but padded for GptOssForCausalLM: it has attention sinks" in caplog.text


def test_old_and_reference_logprobs_come_from_the_layout_of_training(tmp_path):
    """Both models see packed tokens, and what they find is what padded rows give."""
    dist.setup(deadline_s=60)
    overrides = ("batch.packing=shared", "batch.update_epochs=2", "sampling.top_k=5", "loss.kl_coef=0.1")
    run = trainer.build(config(tmp_path, *overrides))
    with torch.no_grad():
        run.policy.model.lm_head.weight.mul_(20)  # so that policy and reference differ
    groups, advantages = groups_and_advantages()
    packed, _ = update.micro_batches(run, groups, advantages)
    padded, _ = update.micro_batches(dataclasses.replace(run, layouts=("padded",)), groups, advantages)
    seen = []
    for module in (run.engine.module, run.reference):
        module.register_forward_pre_hook(lambda module, arguments: seen.append((module, arguments[0].prefix_S)))
    (found,) = update.with_fixed_logprobs(run, packed)
    assert [module for module, _ in seen] == [run.engine.module, run.reference]
    assert all((prefix_S >= 0).sum() == 9 for _, prefix_S in seen)  # all completions share a prompt
    (expected,) = update.with_fixed_logprobs(run, padded)
    for name in ("old_logprobs_N", "reference_logprobs_N"):
        # Padded rows go by length, so that the order differs.
        torch.testing.assert_close(getattr(found, name).sort()[0], getattr(expected, name).sort()[0], rtol=0, atol=1e-4)
    assert (found.old_logprobs_N - found.reference_logprobs_N).abs().max() > 0.1


def test_an_unknown_layout_is_refused():
    with pytest.raises(ConfigError, match="batch.packing=tight: unknown; set one of auto, padded, packed, shared"):
        BatchConfig(packing="tight")


def test_flash_attention_is_given_boundaries_by_the_names_that_transformers_uses():
    from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

    model = tiny("Llama")
    model.config._attn_implementation = "flash_attention_2"
    (batch,) = batches_of("packed")
    given = packed_attention.arguments(model, batch)
    assert given.keys() <= FlashAttentionKwargs.__annotations__.keys()
    assert given["cu_seq_lens_q"].tolist() == given["cu_seq_lens_k"].tolist() == batch.boundaries_S1.tolist()
    assert given["max_length_q"] == given["max_length_k"] == 14
    assert "segments" in packed_attention.arguments(model, batches_of("shared")[0])


def test_the_model_is_left_as_it_was():
    """Packed calls leave no trace in the configuration, nor in a plain forward."""
    model = tiny("Llama")
    ids = torch.arange(12)[None]
    before, expected = model.config._attn_implementation, model(ids).logits
    wrapped = LogprobModel(model, temperature=1.0)
    wrapped(batches_of("shared")[0])
    assert model.config._attn_implementation == before
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(copy.deepcopy(model)(ids).logits, expected)


def test_layout_of_a_shared_batch():
    """The prompt lies once, before its completions; all first tokens are predicted by its last hidden state."""
    (batch,) = batches_of("shared", groups=([group([2, 1, 3], [0, 1, 2])], [[torch.ones(n) for n in (2, 1, 3)]]))
    assert batch.input_ids_L.tolist() == [7, 8, 10, 11, 10]
    assert batch.positions_L.tolist() == [0, 1, 2, 3, 2]
    assert batch.boundaries_S1.tolist() == [0, 2, 4, 5, 5]
    assert batch.prefix_S.tolist() == [-1, 0, 0, 0]
    assert batch.targets_N.tolist() == [10, 11, 12, 10, 11, 10]
    assert batch.source_N.tolist() == [1, 2, 3, 1, 4, 1]
    assert batch.sequence_N.tolist() == [1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_a_sequence_over_the_budget_is_named(layout):
    with pytest.raises(ValueError, match="a sequence of 14 tokens exceeds batch.token_budget=13"):
        batches_of(layout, budget=13)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("budget", [15, 22, 40])
def test_the_budget_is_a_hard_cap(layout, budget):
    for batch in batches_of(layout, budget=budget):
        lengths_S = batch.boundaries_S1.diff()
        rows = int(lengths_S.max()) * len(lengths_S) if layout == "padded" else int(lengths_S.sum())
        assert rows <= budget


def test_first_fit_decreasing_by_hand():
    assert first_fit_decreasing([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]
    assert first_fit_decreasing([], 10) == []
    with pytest.raises(ValueError, match="token_budget=10"):
        first_fit_decreasing([11], 10)


def test_karmarkar_karp_by_hand():
    """{8, 7, 6, 5, 4}: 8-7, 6-5, 4, then 4-1, then 3-1: sums 16 and 14, the textbook's example."""
    sums = sorted(sum([8, 7, 6, 5, 4][i] for i in part) for part in karmarkar_karp([8, 7, 6, 5, 4], 2))
    assert sums == [14, 16]
    assert karmarkar_karp([], 3) == [[], [], []]
    assert sorted(karmarkar_karp([5.0], 3)) == [[], [], [0]]


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_shares_are_nearly_equal_and_hold_everything_once(parts):
    draw = random.Random(parts)
    work = [draw.lognormvariate(0, 1) for _ in range(200)]
    shares = karmarkar_karp(work, parts)
    assert sorted(index for share in shares for index in share) == list(range(200))
    sums = [sum(work[i] for i in share) for share in shares]
    assert max(sums) - min(sums) < 0.01 * sum(sums) / parts


def test_equal_shares_move_nothing_that_need_not_move():
    assert equal_shares([3.0, 3.0, 2.0], [1, 0, 2], 3) == [1, 0, 2]
    assert equal_shares([2.0, 2.0, 2.0, 2.0], [0, 0, 0, 0], 2).count(0) == 2


RANKS = """
import json, sys
import torch
sys.path.insert(0, "tests/helpers")
from collated import group, spread
from rltrain.runtime import dist
from rltrain.batching.collate import collate

dist.setup(deadline_s=120)
lengths = [[8, 5], [3, 9], [7, 7], [1, 2]] if dist.rank() == 0 else []
groups = [group(own, [0, 1], prompt=range(i, i + 4), name=str(i)) for i, own in enumerate(lengths)]
batches, denominators = collate(
    groups, spread(groups), aggregation="token", token_budget=20, max_new_tokens=9, layouts=(sys.argv[1],)
)
targets = [len(batch.targets_N) if bool(batch.weights_N.any()) else 0 for batch in batches]
weight = float(sum(batch.weights_N.sum() for batch in batches))
for found in dist.gather_objects([targets, weight, denominators.tokens], name="results"):
    if dist.is_main():
        print(json.dumps(found))
dist.teardown()  # an exit with the group's threads running may abort
"""


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_ranks_of_unequal_rows_exchange_them(tmp_path, layout):
    """All rows are on rank 0; both ranks come to run half of the 42 tokens, in as many micro-batches."""
    (tmp_path / "ranks.py").write_text(RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(tmp_path / "ranks.py"), layout]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (first, *weights), (second, *other_weights) = (json.loads(line) for line in result.stdout.splitlines())
    assert sum(first) + sum(second) == 42
    assert abs(sum(first) - sum(second)) <= 12
    assert len(first) == len(second)
    assert weights[0] + other_weights[0] == pytest.approx(1)
    assert weights[1] == other_weights[1] == 42


def test_calls_hold_segments_of_one_prefix_and_similar_length():
    segments = [(5, 0), (4, 3), (0, 3), (5, 0), (2, 3), (900, 0)]
    assert attention_calls(segments, 64) == [[5], [0, 3], [1, 4]]
    assert attention_calls([(100, 0), (60, 0)], 10_000) == [[0], [1]]
    assert attention_calls([(100, 0), (60, 0)], 100) == [[0, 1]]


def test_work_by_hand():
    """D = 10: 60 a token, s²/2 or Tq·Tk pairs, 10 for each of 4 vectors a row, and a call."""
    call = CPU.call_pairs(10)
    assert padded_work([4, 2], 10) == 2 * (60 * 4 + 8) + call
    assert packed_work([(4, 0), (2, 0)], 10) == 60 * 6 + 2 * (8 + 10 * 16) + call
    assert packed_work([(4, 0), (2, 4)], 10) == 60 * 6 + (8 + 160) + (2 * 6 + 10 * 16) + 2 * call
    # Merged: 2·4 pairs with the prefix, half of 2², 4 more vectors of 2 outputs, and two calls.
    call = CUDA.call_pairs(10)
    assert packed_work([(4, 0), (2, 4)], 10, CUDA) == 60 * 6 + (8 + 200 * 16) + (8 + 2 + 200 * 20) + 3 * call


@pytest.mark.parametrize(("prompt", "own", "count", "expected"), [
    (4096, 256, 8, "shared"), (90, 8, 8, "shared"), (200, 4000, 16, "packed"), (12, 30, 1, "padded"),
])  # fmt: skip
def test_the_cheapest_layout(prompt, own, count, expected):
    """Long prompts are shared; long completions are not, because a masked half is computed; equal rows need nothing."""
    lengths = [own - 7 * i for i in range(count)] if own > 100 else [own] * count
    groups = [group(lengths, [0.0] * count, prompt=range(prompt))]
    advantages = [[torch.ones(n) for n in lengths]]
    options = {"aggregation": "token", "token_budget": 100_000, "max_new_tokens": own, "hidden_size": 576}
    (batch,), _ = collate(groups, advantages, layouts=("padded", "packed", "shared"), **options)
    found = "padded" if batch.prefix_S is None else "shared" if bool((batch.prefix_S >= 0).any()) else "packed"
    assert found == expected
