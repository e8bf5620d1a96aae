"""Loss masks: only tokens that the model wrote carry loss, in every layout, on one and two ranks."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from collated import group, spread
from two_turns import CONVERSATIONS, LOSSES, conversations, loss_of, models, ours, plain

from rltrain.batching.collate import Denominators, collate
from rltrain.batching.masks import loss_masks, truncated_metrics
from rltrain.loss import importance_weights, log_importance, loss_terms
from rltrain.losses.clip_cov import ClipCovConfig
from rltrain.losses.dppo_tv import DppoTvConfig
from rltrain.losses.fipo import FipoConfig
from rltrain.losses.kl_cov import KlCovConfig
from rltrain.losses.surrogate import SurrogateConfig

ROOT = Path(__file__).parents[3]
LAYOUTS = ["padded", "packed", "shared"]


@pytest.fixture(scope="module")
def two_models():
    return models()


@pytest.fixture(scope="module")
def talks(two_models):
    return conversations(two_models[0])


@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradient_and_metrics_are_those_of_a_loop_over_written_tokens(two_models, talks, name):
    loss = loss_of(name)
    wanted, gradient = plain(*two_models, *talks, loss)
    assert 0 < wanted["clip_ratio/region_mean"] < 1
    assert gradient.abs().max() > 0.01
    for layout in LAYOUTS:
        values, found = ours(*two_models, *talks, loss, layout=layout)
        assert {key: values[key] for key in wanted} == pytest.approx(wanted, rel=1e-6), layout
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-6)


RANKS = """
import json, sys
sys.path.insert(0, "tests/helpers")
import torch
from two_turns import conversations, loss_of, models, ours, plain
from rltrain.runtime import dist

dist.setup(deadline_s=120)
policy, reference = models()
groups, advantages = conversations(policy)
here = slice(dist.rank(), dist.rank() + 1)
for name in ("grpo", "dapo", "gspo", "dapo_truncated"):
    loss = loss_of(name)
    wanted, gradient = plain(policy, reference, groups, advantages, loss)
    for layout in ("padded", "packed", "shared"):
        values, found = ours(policy, reference, groups[here], advantages[here], loss, layout=layout)
        apart = (dist.all_sum(found, name="gradients") - gradient).abs().max()
        if dist.is_main():
            found = {key: values[key] for key in wanted}
            print(json.dumps({"case": [name, layout], "wanted": wanted, "found": found, "apart": float(apart)}))
dist.teardown()  # an exit with the group's threads running may abort
"""


def test_two_ranks_give_the_loss_of_one(tmp_path):
    """Each rank holds a group; losses and denominators are over both."""
    (tmp_path / "ranks.py").write_text(RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(tmp_path / "ranks.py")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    cases = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(cases) == 12
    for case in cases:
        assert case["found"] == pytest.approx(case["wanted"], rel=1e-6), case["case"]
        assert case["apart"] < 1e-6, case["case"]


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_what_stands_at_observed_ids_changes_nothing(two_models, talks, name):
    """Numbers in place of the NaN that the constructor wants, and other advantages there: the same bits."""
    loss, (groups, advantages) = loss_of(name), talks
    (values, gradient) = ours(*two_models, groups, advantages, loss, layout="shared")
    for p, (one, rows) in enumerate(zip(groups, advantages, strict=True)):
        for g, completion in enumerate(one.completions):
            moved = [
                value if flag else -50.0 for value, flag in zip(completion.logprobs, completion.written_T, strict=True)
            ]
            changed = replace(completion)
            object.__setattr__(changed, "logprobs", tuple(moved))
            groups = replaced(
                groups, p, replace(one, completions=(*one.completions[:g], changed, *one.completions[g + 1 :]))
            )
            one = groups[p]
            advantages = replaced(
                advantages, p, replaced(advantages[p], g, rows[g].where(torch.tensor(completion.written_T), math.nan))
            )
    again, found = ours(*two_models, groups, advantages, loss, layout="shared")
    assert again == values
    assert torch.equal(found, gradient)


def replaced(rows, index, value):
    return [value if i == index else row for i, row in enumerate(rows)]


def test_masks_by_hand():
    """Written ids, less those that a filter takes out, less truncated completions; () where all ids carry loss."""
    plain_group = group([3, 2], [0, 1])
    cut = replace(
        plain_group, completions=(plain_group.completions[0], replace(plain_group.completions[1], finish="length"))
    )
    assert loss_masks([plain_group]) == loss_masks([cut]) == loss_masks([plain_group], mask_truncated=True) == ()
    lists = lambda masks: [[mask_T.tolist() for mask_T in rows] for rows in masks]  # noqa: E731
    assert lists(loss_masks([cut], mask_truncated=True)) == [[[True] * 3, [False] * 2]]
    filters = [[torch.tensor([True, False, True]), torch.tensor([False, True])]]
    assert lists(loss_masks([cut], filters)) == [[[True, False, True], [False, True]]]
    assert lists(loss_masks([cut], filters, mask_truncated=True)) == [[[True, False, True], [False, False]]]
    assert truncated_metrics([cut])["loss/truncated_ratio"].total == 1


def test_places_of_a_row_with_a_hole():
    """Ids 10..14 after the prompt 7 8; id 11 is an environment's, and what follows the last loss token is not fed."""
    groups = [group([5], [1.0])]
    masks = [[torch.tensor([True, False, True, True, False])]]
    (batch,), denominators = collate(
        groups, spread(groups), aggregation="sequence", token_budget=64, max_new_tokens=8, masks=masks
    )
    assert batch.input_ids_L.tolist() == [7, 8, 10, 11, 12]
    assert batch.source_N.tolist() == [1, 3, 4]
    assert batch.targets_N.tolist() == [10, 12, 13]
    assert (batch.keys_N - batch.keys_N[0]).tolist() == [0, 2, 3]
    assert batch.weights_N.tolist() == pytest.approx([1 / 3] * 3)
    assert denominators == Denominators(rows=1, tokens=3)


@pytest.mark.parametrize(("aggregation", "weight"), [
    ("token", 1 / 3), ("sequence", 1 / (2 * 3)), ("constant", 1 / (2 * 8)), ("sequence_sum", 1 / 2),
])  # fmt: skip
def test_a_masked_row_counts_as_a_row_but_its_tokens_do_not(aggregation, weight):
    """As TRL has it: two rows, of which the second, of 5 tokens, was cut at the limit."""
    groups = [group([3, 5], [0, 1])]
    masks = [[torch.ones(3, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)]]
    (batch,), denominators = collate(
        groups, spread(groups), aggregation=aggregation, token_budget=64, max_new_tokens=8, masks=masks
    )
    assert denominators == Denominators(rows=2, tokens=3)
    assert batch.targets_N.tolist() == [10, 11, 12]
    assert batch.weights_N.tolist() == pytest.approx([weight] * 3)


def test_a_row_whose_only_advantage_lies_where_no_loss_is_can_be_left_out():
    groups = [group([2, 2], [0, 1])]
    masks = [[torch.tensor([True, False]), torch.tensor([True, True])]]
    advantages = [[torch.tensor([0.0, 9.0]), torch.tensor([0.0, 1.0])]]
    (batch,), denominators = collate(
        groups,
        advantages,
        aggregation="token",
        token_budget=64,
        max_new_tokens=8,
        masks=masks,
        keep_zero_advantages=False,
    )
    assert batch.advantages_N.tolist() == [0.0, 1.0]
    assert denominators == Denominators(rows=2, tokens=3)


def test_completions_that_abstain_or_hold_no_written_id_do_not_count(talks):
    groups, advantages = talks
    first = groups[0]
    groups = [
        replace(first, completions=(replace(first.completions[0], abstains=True), *first.completions[1:])),
        groups[1],
    ]
    _, denominators = collate(
        groups, advantages, aggregation="token", token_budget=99, max_new_tokens=12, masks=loss_masks(groups)
    )
    written = [sum(w for w, _ in talk) for conversation in CONVERSATIONS for talk in conversation]
    assert denominators == Denominators(rows=5, tokens=sum(written[1:]))


def only_written(groups, advantages):
    """The same completions and advantages as if no environment had written anything."""
    values = [
        [row_T[torch.tensor(completion.written_T)] for completion, row_T in zip(one.completions, rows, strict=True)]
        for one, rows in zip(groups, advantages, strict=True)
    ]
    bare = [
        replace(completion, token_ids=completion.written_ids, logprobs=completion.written_logprobs, turns=())
        for one in groups
        for completion in one.completions
    ]
    return [replace(one, completions=tuple(bare[3 * p : 3 * p + 3])) for p, one in enumerate(groups)], values


ALL_LOSSES = {
    "cispo": SurrogateConfig(surrogate="cispo"),
    "gspo": SurrogateConfig(ratio="sequence"),
    "fipo": FipoConfig(half_life_tokens=2.0, weight_low=0.1, weight_high=5.0),
    "clip_cov": ClipCovConfig(share=1.0, cov_low=0.0, cov_high=0.5),
    "kl_cov": KlCovConfig(share=0.3),
    "dppo_tv": DppoTvConfig(),
    "sequence_truncate": SurrogateConfig(importance_correction="sequence_truncate", importance_cap=1.1),
}


def terms_of(groups, advantages, loss):
    """Each token's term times its importance weight, and its metrics, in the order of the sampled log-probs."""
    (batch,), _ = collate(
        groups, advantages, aggregation="token", token_budget=999, max_new_tokens=12, masks=loss_masks(groups)
    )
    sampled_N = batch.sampler_logprobs_N
    batch = replace(batch, old_logprobs_N=sampled_N + 0.1 * (991 * sampled_N).cos())
    (batch,) = loss.marked([batch], "0/0/0")
    logprobs_N, order_N = sampled_N + 0.2 * (997 * sampled_N).sin(), sampled_N.argsort()
    assert len(sampled_N.unique()) == len(sampled_N)
    terms = loss_terms(logprobs_N, batch, loss)
    weights_N = importance_weights(log_importance(logprobs_N, batch, loss), loss)
    return (terms.loss_N * weights_N)[order_N], {name: values_N[order_N] for name, values_N in terms.metrics_N.items()}


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_every_loss_is_that_of_the_written_tokens_alone(talks, name):
    """Sums over a completion, its future, covariances and selections leave out what an environment wrote."""
    found, metrics = terms_of(*talks, ALL_LOSSES[name])
    wanted, wanted_metrics = terms_of(*only_written(*talks), ALL_LOSSES[name])
    torch.testing.assert_close(found, wanted)
    assert {key: value.tolist() for key, value in metrics.items()} == {
        key: pytest.approx(value.tolist()) for key, value in wanted_metrics.items()
    }
