"""The estimators that read entropies: the 80/20 mask, GTPO and the optimal token baseline, by hand and by identity."""

import numpy as np
import pytest
import torch
from advantage_groups import make_group
from entropy_tables import by_place, entropies, float64
from enumerated_gradients import exact_entropies, expected_gradient, table
from hypothesis import given
from hypothesis import strategies as st

from rltrain.advantages.entropy_mask import EntropyMaskConfig, entropy_mask, threshold
from rltrain.advantages.group import group_advantages
from rltrain.advantages.gtpo import GTPOConfig, gtpo
from rltrain.advantages.optimal_token_baseline import (
    OptimalTokenBaselineConfig,
    optimal_token_advantages,
    optimal_token_baseline,
)
from rltrain.advantages.score_norms import exact_norms, lite_norms
from rltrain.errors import ConfigError
from rltrain.types import Completion, Context, TokenEntropy

ENTROPIES = [[[0.1, 0.9], [0.5]], [[0.7, 0.2, 0.3], [0.5, 0.8, 0.4, 0.6]]]


def two_groups():
    return [make_group([(1, 2), (3,)], [1.0, 0.0]), make_group([(4, 5, 6), (7, 8, 9, 9)], [0.0, 1.0])]


def lists(values):
    return [[row_T.tolist() for row_T in rows] for rows in values]


# --- 80/20 -------------------------------------------------------------------------------------------------------


def test_the_mask_by_hand():
    """Ten tokens; the two of highest entropy are 0.9 and 0.8, scaled by 10/2."""
    context = Context(entropy=entropies(ENTROPIES))
    result = entropy_mask(two_groups(), EntropyMaskConfig(), context)
    good, bad = group_advantages([1.0, 0.0]).tolist()
    assert lists(result.values) == [[[0.0, 5 * good], [0.0]], [[0.0, 0.0, 0.0], [0.0, 5 * good, 0.0, 0.0]]]
    assert bad == -good
    assert result.metrics["entropy_mask/threshold"].value == 0.8
    assert (result.metrics["entropy_mask/kept_share"].total, result.metrics["entropy_mask/kept_share"].count) == (2, 10)


def test_ties_are_kept_and_the_scale_follows():
    values_N = float64([1.0, 2.0, 2.0, 2.0, 0.0])
    assert threshold(values_N, 0.2) == (2.0, 5 / 3)  # one wanted, three reach it
    assert threshold(values_N, 0.8) == (1.0, 5 / 4)
    assert threshold(float64([0.0] * 15), 0.2) == (0.0, 1.0)
    assert threshold(float64(range(15)), 0.2) == (12.0, 5.0)  # 0.2·15 is 3, whatever its rounding
    assert threshold(float64([]), 0.2) == (float("inf"), 1.0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.floats(0.01, 1))
def test_the_kept_tokens_are_the_least_number_that_reaches_the_share(values, share):
    lowest, factor = threshold(float64(values), share)
    kept = sum(value >= lowest for value in values)
    assert kept * factor == pytest.approx(len(values))
    assert kept >= share * len(values) - 1e-6
    assert sum(value > lowest for value in values) < share * len(values)


def test_the_whole_share_is_grpo_and_abstainers_are_not_counted():
    context = Context(entropy=entropies(ENTROPIES))
    result = entropy_mask(two_groups(), EntropyMaskConfig(share=1.0), context)
    assert lists(result.values)[1] == [
        [row] * n for row, n in zip(group_advantages([0.0, 1.0]).tolist(), (3, 4), strict=True)
    ]
    groups = [make_group([(1, 2), (3,), (4,)], [1.0, 0.0, None])]
    context = Context(entropy=entropies([[[0.1, 0.9], [0.5], [3.0]]]))
    result = entropy_mask(groups, EntropyMaskConfig(share=1 / 3), context)
    good = float(group_advantages([1.0, 0.0])[0])
    assert lists(result.values) == [[[0.0, 3 * good], [0.0], [0.0]]]


# --- GTPO --------------------------------------------------------------------------------------------------------


def test_gtpo_by_hand():
    """Mean 0.5: factors 1 + 0.1(0.2 - 1) and 1 + 0.1(1.8 - 1). Over the batch the mean is 0.5, too: 5.0 of 10."""
    good, bad = group_advantages([1.0, 0.0]).tolist()
    context = Context(entropy=entropies(ENTROPIES))
    (first, second), (third, _) = lists(gtpo(two_groups(), GTPOConfig(), context).values)
    assert first == pytest.approx([0.92 * good, 1.08 * good], abs=1e-12)
    assert second == pytest.approx([bad], abs=1e-12)  # a token alone is its own mean
    assert third == pytest.approx([bad * f for f in (1.075, 0.95, 0.975)], abs=1e-12)  # mean 0.4
    over_batch = lists(gtpo(two_groups(), GTPOConfig(mean_over="batch"), context).values)
    assert over_batch[1][0] == pytest.approx([bad * f for f in (1.04, 0.94, 0.96)], abs=1e-12)


def test_a_completions_mean_advantage_is_the_groups_until_a_factor_is_cut():
    context = Context(entropy=entropies(ENTROPIES))
    for rows, rewards in zip(gtpo(two_groups(), GTPOConfig(beta=0.5), context).values, ([1, 0], [0, 1]), strict=True):
        for row_T, shared in zip(rows, group_advantages(rewards), strict=True):
            assert float(row_T.mean()) == pytest.approx(float(shared), abs=1e-12)
    (rows, _) = gtpo(two_groups(), GTPOConfig(beta=10.0), context).values
    assert rows[0].tolist() == pytest.approx([0.0, 9 * float(group_advantages([1, 0])[0])])  # 1 + 10(0.2 - 1) < 0


def test_no_entropy_anywhere_is_grpo():
    context = Context(entropy=entropies([[[0.0, 0.0], [0.0]]]))
    (rows,) = gtpo([make_group([(1, 2), (3,)], [1.0, 0.0])], GTPOConfig(), context).values
    good, bad = group_advantages([1.0, 0.0]).tolist()
    assert [row_T.tolist() for row_T in rows] == [[good, good], [bad]]


# --- optimal token baseline --------------------------------------------------------------------------------------


NORMS = [float64([0.5, 0.5, 1.0]), float64([1.0, 0.25]), float64([0.25])]


def test_the_optimal_baseline_by_hand():
    """W = (.5, 1, 2), (1, 1.25), (.25); r = 1, 0, 1. B_0 = .75/1.75, B_1 = 1/2.25, B_2 = 0 beyond the second-longest.

    Leaving i out: B_0 = .25/1.25, .75/.75, .5/1.5;  B_1 = 0/1.25 and 1/1.
    """
    rows = optimal_token_advantages(NORMS, [1.0, 0.0, 1.0])
    for row_T, expected in zip(rows, ([4 / 7, 5 / 9, 1.0], [-3 / 7, -4 / 9], [4 / 7]), strict=True):
        assert row_T.tolist() == pytest.approx(expected, abs=1e-7)
    rows = optimal_token_advantages(NORMS, [1.0, 0.0, 1.0], leave_one_out=True)
    for row_T, expected in zip(rows, ([0.8, 1.0, 1.0], [-1.0, -1.0], [2 / 3]), strict=True):
        assert row_T.tolist() == pytest.approx(expected, abs=1e-7)


def test_the_weighted_advantages_of_a_place_sum_to_zero():
    generator = torch.Generator().manual_seed(0)
    norms = [torch.rand(n, generator=generator, dtype=torch.float64) for n in (5, 3, 4, 4)]
    rows = optimal_token_advantages(norms, [0.3, 1.0, 0.0, 2.0])
    for t in range(4):  # up to the second-longest
        alive = [i for i in range(4) if len(norms[i]) > t]
        assert sum(float(norms[i][: t + 1].sum() * rows[i][t]) for i in alive) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(("leave_one_out", "baseline"), [(False, "mean"), (True, "leave_one_out")])
def test_equal_norms_and_lengths_are_the_group_baseline(leave_one_out, baseline):
    rewards = [1.0, 0.0, 0.5]
    rows = optimal_token_advantages([float64([1.0, 2.0])] * 3, rewards, leave_one_out=leave_one_out)
    for row_T, expected in zip(rows, group_advantages(rewards, baseline=baseline, scale="none").tolist(), strict=True):
        assert row_T.tolist() == pytest.approx([expected] * 2, abs=1e-7)


def test_equal_rewards_leave_the_tail_of_the_longest():
    rows = optimal_token_advantages(NORMS, [1.0, 1.0, 1.0])
    assert rows[0].tolist() == pytest.approx([0.0, 0.0, 1.0], abs=1e-7)
    assert OptimalTokenBaselineConfig().learns_from_equal_rewards()
    assert [row_T.tolist() for row_T in optimal_token_advantages(NORMS, [0.0] * 3)] == [[0.0] * 3, [0.0] * 2, [0.0]]


def test_who_abstains_is_in_no_sum_and_a_reward_alone_has_no_baseline():
    kept = optimal_token_advantages(NORMS[:2], [1.0, 0.0])
    with_abstainer = optimal_token_advantages(NORMS, [1.0, 0.0, None])
    assert [row_T.tolist() for row_T in with_abstainer] == [*(row_T.tolist() for row_T in kept), [0.0]]
    alone = optimal_token_advantages(NORMS, [None, 0.5, None])
    assert [row_T.tolist() for row_T in alone] == [[0.0] * 3, [0.5] * 2, [0.0]]


def test_score_norms_are_those_of_autograd():
    logits_V = float64([0.3, -1.0, 2.0, 0.0]).requires_grad_()
    logprobs_V = logits_V.log_softmax(0)
    (gradient_V,) = torch.autograd.grad(logprobs_V[2], logits_V)
    completion = Completion(token_ids=(2,), logprobs=(logprobs_V[2].item(),), finish="stop")
    collision_T = logprobs_V.detach().exp().square().sum()[None]
    token = TokenEntropy(entropy_T=collision_T, collision_T=collision_T)
    assert float(exact_norms(completion, token)) == pytest.approx(float(gradient_V.square().sum()), abs=1e-12)
    assert float(lite_norms(completion)) == pytest.approx(float(gradient_V[2] ** 2), abs=1e-12)


def test_the_part_uses_log_probs_and_collisions():
    """p = 1 (log-prob 0): w = 1 - 2 + c = c - 1 < 0 is cut to 0, so the baseline is 0 and A = r."""
    groups = [make_group([(1, 2), (3,)], [1.0, 0.5])]
    context = Context(entropy=entropies([[[0.0, 0.0], [0.0]]], [[[0.5, 1.0], [1.0]]]))
    (rows,) = optimal_token_baseline(groups, OptimalTokenBaselineConfig(), context).values
    assert [row_T.tolist() for row_T in rows] == [[1.0, 1.0], [0.5]]


def test_leaving_out_is_unbiased_by_enumeration():
    """Over all 256 groups of two; with i included it is biased."""
    policy = table()
    context = Context(entropy=exact_entropies(policy))
    for leave_one_out, tolerance in ((True, 1e-7), (False, None)):
        config = OptimalTokenBaselineConfig(leave_one_out=leave_one_out)
        found = expected_gradient(policy, lambda g, c=config: optimal_token_baseline(g, c, context).values, 2)
        if tolerance:
            np.testing.assert_allclose(found, policy.true_gradient, atol=tolerance)
        else:
            assert np.abs(found - policy.true_gradient).max() > 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EntropyMaskConfig(share=0.0), r"advantage\.share=0\.0: must lie in \(0, 1\]"),
        (lambda: GTPOConfig(mean_over="group"), r"advantage\.mean_over=group: unknown; set one of completion, batch"),
        (lambda: GTPOConfig(beta=-1.0), r"advantage\.beta=-1\.0: must be >= 0; 0 is GRPO"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_ties_by_place_do_not_depend_on_the_order_of_the_groups():
    groups = [make_group([(1, 2, 3), (5,), (3, 3)], [1.0, 0.0, 0.5], name=str(i)) for i in range(3)]
    forward = entropy_mask(groups, EntropyMaskConfig(), Context(entropy=by_place)).values
    backward = entropy_mask(groups[::-1], EntropyMaskConfig(), Context(entropy=by_place)).values
    assert lists(forward) == lists(backward[::-1])
