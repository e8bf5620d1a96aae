"""Weights are set before packing, so packing changes nothing."""

import pickle

import pytest
import torch
from collated import group, spread

from rltrain.batching.bins import padded_bins
from rltrain.batching.collate import Denominators, LossRow, collate, compact, padding_share, token_weight


def packed(groups, aggregation="token", budget=64, **options):
    return collate(groups, spread(groups), aggregation=aggregation, token_budget=budget, max_new_tokens=8, **options)


@pytest.mark.parametrize(("aggregation", "expected"), [
    ("token", 1 / 10), ("sequence", 1 / (4 * 5)), ("constant", 1 / (4 * 8)), ("sequence_sum", 1 / 4),
])  # fmt: skip
def test_token_weights_by_hand(aggregation, expected):
    denominators = Denominators(rows=4, tokens=10)
    assert token_weight(5, denominators, aggregation=aggregation, max_new_tokens=8) == pytest.approx(expected)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant", "sequence_sum"])
def test_weights_do_not_depend_on_the_packing(aggregation):
    groups = [group([3, 5], [0, 1]), group([1, 4, 2], [1, 0, 1])]
    one, _ = packed(groups, aggregation, budget=64)
    many, _ = packed(groups, aggregation, budget=7)
    assert len(one) == 1
    assert len(many) > 2
    flat = lambda batches: sorted(torch.cat([b.weights_N for b in batches]).tolist())  # noqa: E731
    assert flat(one) == flat(many)


def test_token_and_sequence_weights_sum_to_one():
    groups = [group([3, 5], [0, 1]), group([1, 4, 2], [1, 0, 1])]
    for aggregation in ("token", "sequence"):
        batches, _ = packed(groups, aggregation, budget=9)
        assert float(sum(b.weights_N.sum() for b in batches)) == pytest.approx(1.0)


def test_layout_of_a_packed_batch():
    """Each completion token is predicted from the position before it; the last one predicts nothing and is not fed."""
    (batch,), _ = packed([group([3, 1], [0, 1])])
    assert batch.input_ids_L.tolist() == [7, 8, 10, 11, 7, 8]
    assert batch.positions_L.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.boundaries_S1.tolist() == [0, 4, 6]
    assert batch.source_N.tolist() == [1, 2, 3, 5]
    assert batch.targets_N.tolist() == [10, 11, 12, 10]
    assert batch.sequence_N.tolist() == [0, 0, 0, 1]


def test_abstaining_and_empty_completions_leave_the_denominators():
    groups = [group([3, 0, 2], [1.0, 0.0, float("nan")])]
    batches, denominators = packed(groups)
    assert denominators == Denominators(rows=1, tokens=3)
    assert sum(len(b.targets_N) for b in batches) == 3


def test_rows_of_zero_advantage_can_be_left_out_but_still_count():
    groups = [group([3, 2], [1, 0]), group([4, 4], [1, 1])]
    advantages = [[torch.ones(3), -torch.ones(2)], [torch.zeros(4), torch.zeros(4)]]
    batches, denominators = collate(
        groups, advantages, aggregation="token", token_budget=64, max_new_tokens=8, keep_zero_advantages=False
    )
    assert denominators == Denominators(rows=4, tokens=13)
    assert sum(len(b.targets_N) for b in batches) == 5
    assert float(batches[0].weights_N[0]) == pytest.approx(1 / 13)


def test_without_rows_there_is_one_micro_batch_of_weight_zero():
    groups = [group([2, 2], [1, 1])]
    batches, _ = collate(
        groups, spread(groups, 0.0), aggregation="token", token_budget=8, max_new_tokens=4, keep_zero_advantages=False
    )
    assert [b.weights_N.tolist() for b in batches] == [[0.0]]


def test_pack_counts_padding_against_the_budget():
    """Longest first; rows of a bin are padded to its longest."""
    assert padded_bins([4, 3, 3, 2, 6], budget=8) == [[4], [0, 1], [2, 3]]
    assert padded_bins([4, 3, 3, 2, 6], budget=12) == [[4, 0], [1, 2, 3]]
    lengths = [5, 1, 4, 4, 2, 2, 3]
    bins = padded_bins(lengths, budget=9)
    assert sorted(index for one in bins for index in one) == list(range(7))
    assert all(max(lengths[index] for index in one) * len(one) <= 9 for one in bins)
    assert padded_bins([], budget=7) == []


def test_one_long_row_does_not_pad_many_short_ones_over_the_budget():
    bins = padded_bins([4000] + [10] * 400, budget=4096)
    assert bins[0] == [0]
    assert [len(one) for one in bins[1:]] == [400]


def test_padding_share_by_hand():
    """Rows of 4 and 2 fed tokens padded to 4: 2 of 8; packed there is none."""
    (batch,), _ = packed([group([3, 1], [0, 1])])
    share = padding_share([batch])
    assert (share.total, share.count) == (2, 8)
    (batch,), _ = packed([group([3, 1], [0, 1])], layouts=("packed",))
    share = padding_share([batch])
    assert (share.total, share.count) == (0, 6)


def test_a_sequence_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="token_budget=7"):
        padded_bins([8], budget=7)


def test_a_row_for_another_rank_is_pickled_without_the_other_rows():
    all_of_a_step = torch.arange(1_000_000, dtype=torch.float64)
    row = LossRow(
        prompt_ids=(1,), completion_ids=(2, 3), sampler_logprobs=(-1.0, -1.0), advantages_T=all_of_a_step[5:7]
    )
    (sent,) = pickle.loads(pickled := pickle.dumps(compact((row,))))
    assert sent.advantages_T.tolist() == [5.0, 6.0]
    assert len(pickled) < 2000 < 8_000_000 < len(pickle.dumps(row))


def test_an_advantage_of_the_wrong_length_is_named():
    groups = [group([2], [1.0], name="q17")]
    with pytest.raises(ValueError, match="q17: 3 values for 2 tokens"):
        collate(groups, [[torch.ones(3)]], aggregation="token", token_budget=8, max_new_tokens=4)
