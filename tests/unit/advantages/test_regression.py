"""The regression baseline: by hand, against plain loops, and unbiased by enumeration."""

import dataclasses

import numpy as np
import pytest
import torch
from advantage_groups import make_group
from entropy_tables import by_place, float64
from enumerated_gradients import all_groups, exact_entropies, expected_gradient, shifted, table

from rltrain.advantages.estimator import estimator_of
from rltrain.advantages.group import group_advantages
from rltrain.advantages.prefix_tree import common_prefixes, leave_one_out_values
from rltrain.advantages.regression import RegressionConfig, RegressionSums, regression
from rltrain.errors import ConfigError
from rltrain.types import Context, Need

IDS, REWARDS = [[1, 2, 3], [1, 2, 4], [1, 5], [6]], [1.0, 0.0, 1.0, 0.25]


def with_logprobs(group, seed=0):
    generator = torch.Generator().manual_seed(seed)
    completions = [
        dataclasses.replace(one, logprobs=tuple((-torch.rand(len(one.token_ids), generator=generator)).tolist()))
        for one in group.completions
    ]
    return dataclasses.replace(group, completions=tuple(completions))


def mixed(name="p", seed=0):
    return with_logprobs(make_group(IDS, REWARDS, name=name), seed)


def estimate(groups, state, entropy=by_place, **options):
    return regression(groups, RegressionConfig(**options), Context(state=state, entropy=entropy)).values


def test_the_first_step_is_rloo_and_stores_its_sums():
    state = {}
    ((rows),) = estimate([mixed()], state)
    rloo = group_advantages(REWARDS, baseline="leave_one_out", scale="none").tolist()
    for row_T, ids, expected in zip(rows, IDS, rloo, strict=True):
        assert row_T.tolist() == pytest.approx([expected] * len(ids), abs=1e-12)
    assert set(state) == {"moments_FF", "targets_F"} and bool((state["moments_FF"].diagonal() > 0).all())


def test_the_second_step_by_hand():
    """Two completions of one token, p = 1/2, so w = 1/4; rewards 1, 0; R = 0 and 1. Features (1, R):

    M = 1/4·[[2, 1], [1, 1]],  q = 1/4·(1, 0),  D = 0.03·diag(1/2, 1/4),  (M + D)c = q + D·(0, 1)
    [[.515, .25], [.25, .2575]] c = (.25, .0075);  determinant .0701125
    """
    half = (-0.6931471805599453,)
    group = make_group([[1], [2]], [1.0, 0.0])
    group = dataclasses.replace(
        group, completions=tuple(dataclasses.replace(c, logprobs=half) for c in group.completions)
    )
    state = {}
    estimate([group], state, tree=False)
    (rows,) = estimate([group], state, tree=False)
    constant, slope = 0.0625 / 0.0701125, -0.0586375 / 0.0701125
    assert float(rows[0]) == pytest.approx(1 - constant, abs=1e-12)
    assert float(rows[1]) == pytest.approx(-constant - slope, abs=1e-12)
    assert state["targets_F"].tolist() == pytest.approx([0.9 * 0.25 + 0.25, 0.0], abs=1e-12)  # decayed, then added


def slow_sums(groups, *, running):
    """M and q token by token, every sum of the others by a loop."""
    moments, targets = np.zeros((3, 3)), np.zeros(3)
    for group in groups:
        rewards = group.rewards_G.tolist()
        values = leave_one_out_values(common_prefixes(group.completion_ids), group.rewards_G.double())
        for i, completion in enumerate(group.completions):
            others = [rewards[j] for j in range(len(rewards)) if j != i]
            weight = 0.0
            for t, logprob in enumerate(completion.logprobs):
                here = (1 - np.exp(logprob)) ** 2
                weight = weight + here if running else here
                f = np.array([1.0, sum(others) / len(others), float(values[i][t])])
                moments, targets = moments + weight * np.outer(f, f), targets + weight * f * rewards[i]
    return moments, targets


@pytest.mark.parametrize("running", [False, True])
def test_the_sums_are_those_of_a_plain_loop(running):
    groups, state = [mixed(seed=1), mixed(seed=2)], {}
    estimate(groups, state, running_sum=running)
    moments, targets = slow_sums(groups, running=running)
    np.testing.assert_allclose(state["moments_FF"], moments, atol=1e-12)
    np.testing.assert_allclose(state["targets_F"], targets, atol=1e-12)
    rows = estimate(groups, state, running_sum=running)  # c'f with c from these sums
    pull = 0.03 * np.diag(moments)
    c = np.linalg.solve(moments + np.diag(pull), targets + pull * np.array([0, 1, 0]))
    value = float(leave_one_out_values(common_prefixes(IDS), float64(REWARDS))[0][2])
    assert float(rows[0][0][2]) == pytest.approx(1 - c @ np.array([1.0, 1.25 / 3, value]), abs=1e-12)


@pytest.mark.parametrize(
    ("options", "size"), [({}, 3), ({"tree": False}, 2), ({"weight": "exact"}, 2), ({"running_sum": True}, 2)]
)
def test_it_is_unbiased_by_enumeration(options, size):
    """Over all groups, with coefficients fitted on an earlier rollout. A constant added to the rewards changes no more.

    The estimate of every group has the state from before, as in one rollout.
    """
    policy = table()
    _, groups, _ = all_groups(policy, 2)
    fitted = {}
    estimate(groups[::7], fitted, exact_entropies(policy), **options)
    c_F = RegressionSums(moments_FF=fitted["moments_FF"], targets_F=fitted["targets_F"]).coefficients(0.03)
    assert abs(float(c_F[0])) > 0.01  # not RLOO

    def values(groups):
        return estimate(groups, dict(fitted), exact_entropies(policy), **options)

    np.testing.assert_allclose(expected_gradient(policy, values, size), policy.true_gradient, atol=1e-12)
    moved = expected_gradient(policy, lambda groups: values(shifted(groups, 1.0)), 2)
    np.testing.assert_allclose(moved, policy.true_gradient, atol=1e-12)


def test_coefficients_are_pulled_to_rloo():
    moments_FF, targets_F = float64([[2.0, 1.0], [1.0, 1.0]]), float64([1.0, 0.0])
    fit = RegressionSums(moments_FF=moments_FF, targets_F=targets_F)
    assert fit.coefficients(1e12).tolist() == pytest.approx([0.0, 1.0], abs=1e-9)
    assert fit.coefficients(1e-12).tolist() == pytest.approx([1.0, -1.0], abs=1e-9)
    unknown = RegressionSums(moments_FF=float64([[2.0, 0.0], [0.0, 0.0]]), targets_F=targets_F)
    assert unknown.coefficients(0.03).tolist() == [0.0, 1.0]  # all rewards were 0


def test_a_permutation_of_the_rollout_changes_nothing():
    groups = [mixed("a", 1), mixed("b", 2), mixed("c", 3)]
    order = [3, 1, 0, 2]
    turned = [
        dataclasses.replace(
            group, completions=tuple(group.completions[i] for i in order), rewards_G=group.rewards_G[order]
        )
        for group in groups[::-1]
    ]
    one, other = {}, {}
    for _ in range(2):
        rows, moved = estimate(groups, one), estimate(turned, other)
    for of_group, of_moved in zip(rows, moved[::-1], strict=True):
        for place, i in enumerate(order):
            torch.testing.assert_close(of_moved[place], of_group[i], atol=1e-9, rtol=0)


def test_equal_rewards_teach_unless_they_are_zeroed():
    right = with_logprobs(make_group([[1, 2], [3]], [1.0, 1.0]))
    fitted = {}
    estimate([mixed(), right], fitted)
    (kept,), (zeroed,), (scaled,) = (
        estimate([right], dict(fitted), **options) for options in ({}, {"zero_equal_groups": True}, {"scale": "std"})
    )
    assert min(abs(float(row_T[0])) for row_T in kept) > 0.01
    assert [row_T.tolist() for row_T in zeroed] == [row_T.tolist() for row_T in scaled] == [[0.0, 0.0], [0.0]]


def test_std_divides_what_is_left():
    fitted = {}
    estimate([mixed()], fitted)
    (plain,), (scaled,) = (estimate([mixed()], dict(fitted), scale=scale) for scale in ("none", "std"))
    std = float64(REWARDS).std(correction=1)
    for row_T, other_T in zip(plain, scaled, strict=True):
        torch.testing.assert_close(row_T / (std + 1e-6), other_T)


def test_the_prefix_scale_multiplies_what_is_left():
    """Three of the four share the first token: (2·4 - 1)/4 before it, (2·3 - 1)/3 after it; alone it is 1."""
    fitted = {}
    estimate([mixed()], fitted)
    (plain,), (scaled,) = (estimate([mixed()], dict(fitted), prefix_scale=value) for value in (False, True))
    assert (scaled[0] / plain[0]).tolist() == pytest.approx([7 / 4, 5 / 3, 3 / 2])
    assert (scaled[3] / plain[3]).tolist() == pytest.approx([7 / 4])
    torch.testing.assert_close(scaled[2] / plain[2], float64([7 / 4, 5 / 3]))


def test_abstentions_are_in_no_sum():
    ids, rewards = [*IDS[:1], [1, 2, 9], *IDS[1:]], [REWARDS[0], None, *REWARDS[1:]]
    whole = mixed()
    group = make_group(ids, rewards)
    silent = dataclasses.replace(whole.completions[1], token_ids=(1, 2, 9))
    completions = (whole.completions[0], silent, *whole.completions[1:])
    with_abstainer, alone = {}, {}
    estimate([dataclasses.replace(group, completions=completions)], with_abstainer)
    estimate([whole], alone)
    for name in alone:
        torch.testing.assert_close(with_abstainer[name], alone[name], atol=1e-12, rtol=0)
    lone = with_logprobs(make_group([[1], [2]], [None, 0.7]))
    state = {}
    ((first, second),) = estimate([lone], state)
    assert (first.tolist(), second.tolist()) == ([0.0], [0.0]) and not bool(state["moments_FF"].any())


def test_needs_and_refusals():
    assert estimator_of("regression").needs == {Need.STATE}
    assert estimator_of("regression", {"weight": "exact"}).needs == {Need.STATE, Need.ENTROPY}
    for options, message in (
        ({"weight": "full"}, r"advantage\.weight=full: unknown; set one of lite, exact"),
        ({"decay": 1.0}, r"advantage\.decay=1\.0: must lie in \[0, 1\); 0\.9 is usual"),
        ({"ridge": 0.0}, r"advantage\.ridge=0\.0: must be > 0, or the fit may be singular"),
    ):
        with pytest.raises(ConfigError, match=message):
            RegressionConfig(**options)


def test_a_run_of_it_refuses_dynamic_sampling():
    from rltrain import cli

    with pytest.raises(ConfigError, match="batch.dynamic_sampling=true: drops groups that this estimator learns from"):
        cli.compose(["+experiment=quickstart", "advantage=regression", "batch.dynamic_sampling=true"])
    assert cli.compose(["+experiment=quickstart", "algorithm=regression"]).needs() == {Need.STATE}
