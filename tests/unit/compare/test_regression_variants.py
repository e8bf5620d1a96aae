"""scripts/reproduce/regression_variants.py and its file: against the package's regression, by formula, unbiased."""

import dataclasses
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from advantage_groups import make_group
from entropy_tables import by_place
from enumerated_gradients import all_groups, exact_entropies, expected_gradient, table

from rltrain import cli
from rltrain.advantages.group import group_advantages
from rltrain.advantages.regression import RegressionConfig, regression
from rltrain.types import Context, Need

SCRIPTS = Path(__file__).parents[3] / "scripts" / "reproduce"
IDS, REWARDS = [[1, 2, 3], [1, 2, 4], [1, 5], [6]], [1.0, 0.0, 1.0, 0.25]


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("league"), importlib.import_module("regression_variants")
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in ("league", "regression_variants"):
            sys.modules.pop(name, None)


def mixed():
    generator = torch.Generator().manual_seed(0)
    group = make_group(IDS, REWARDS)
    completions = [
        dataclasses.replace(one, logprobs=tuple((-torch.rand(len(one.token_ids), generator=generator)).tolist()))
        for one in group.completions
    ]
    return dataclasses.replace(group, completions=tuple(completions))


def test_a_warm_up_is_rloo_and_then_the_regression_that_saw_it(scripts):
    variants, state, plain = scripts[1], {}, {}
    rloo = group_advantages(REWARDS, baseline="leave_one_out", scale="none").tolist()
    for _ in range(3):
        (rows,) = variants.warm_up([mixed()], {"rollouts": 2}, Context(state=state)).values
        (expected,) = regression([mixed()], RegressionConfig(), Context(state=plain)).values
        firsts = [float(row_T[0]) for row_T in rows]
        assert firsts == pytest.approx(rloo if state["rollouts"] < 3 else [float(row_T[0]) for row_T in expected])


def test_the_pull_by_the_trace_is_the_formula(scripts):
    variants, state, plain = scripts[1], {}, {}
    variants.unit_ridge([mixed()], {}, Context(state=state))
    regression([mixed()], RegressionConfig(), Context(state=plain))
    for name in plain:
        torch.testing.assert_close(state[name], plain[name])  # the same sums
    moments, targets = plain["moments_FF"].numpy(), plain["targets_F"].numpy()
    mu = 0.03 * np.trace(moments) / 3
    c = np.linalg.solve(moments + mu * np.eye(3), targets + mu * np.array([0, 1, 0]))
    ((rows),) = variants.unit_ridge([mixed()], {}, Context(state=dict(state))).values
    assert float(rows[0][0]) == pytest.approx(1 - c @ np.array([1.0, 1.25 / 3, 1.25 / 3]), abs=1e-12)


def test_peakedness_is_unbiased_by_enumeration(scripts):
    variants, policy, fitted = scripts[1], table(), {}
    _, groups, _ = all_groups(policy, 2)
    entropy = exact_entropies(policy)
    variants.peakedness(groups[::7], {}, Context(state=fitted, entropy=entropy))
    assert fitted["targets_F"].shape == (5,)

    def values(groups):
        return variants.peakedness(groups, {}, Context(state=dict(fitted), entropy=entropy)).values

    np.testing.assert_allclose(expected_gradient(policy, values, 2), policy.true_gradient, atol=1e-12)
    first = variants.peakedness([mixed()], {}, Context(state={}, entropy=by_place)).values[0]
    rloo = group_advantages(REWARDS, baseline="leave_one_out", scale="none").tolist()
    assert [float(row_T[0]) for row_T in first] == pytest.approx(rloo)


def test_every_cell_of_the_file_is_a_run(scripts):
    """Twelve methods on think first, then five at three rates of normalised SGD. They differ in the estimator."""
    league = scripts[0]
    given = league.specification(SCRIPTS / "regression.yaml")
    chosen = league.cells(given, seeds=[0]) + league.cells_by_rate(given, tasks=["normalised SGD"], seeds=[0])
    assert len(chosen) == 12 + 15 and len({one.folder for one in chosen}) == 27
    picked = [("think first", "GRPO"), ("think first", "peakedness"), ("normalised SGD", "GRPO")]
    words = {(one.task, one.method): one.words for one in chosen}
    plain, custom, sgd = (cli.compose([*words[cell], "run_dir=runs/x"]) for cell in picked)
    assert (custom.loss, custom.batch, custom.optimizer) == (plain.loss, plain.batch, plain.optimizer)
    assert Need.ENTROPY in custom.needs() and plain.optimizer.learning_rate == 1e-4
    assert (sgd.optimizer.eps, sgd.optimizer.max_grad_norm, sgd.loss) == (1.0, 1e-3, plain.loss)
