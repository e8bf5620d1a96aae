import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rltrain import config
from rltrain.config import AdvantageConfig
from rltrain.registry import register

SCRIPT = Path(__file__).parents[3] / "scripts" / "bench" / "estimators.py"


@pytest.fixture(scope="module")
def bench():
    specification = importlib.util.spec_from_file_location("bench_estimators", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules["bench_estimators"] = module
    specification.loader.exec_module(module)
    config.discover()
    return module


def test_the_true_gradient_is_autograd_of_the_expected_reward(bench):
    for task in bench.TASKS:
        world = bench.enumerate_world(task, 3)
        logits_SV = torch.from_numpy(world.policy_SV).log().requires_grad_()
        logprobs_SV = logits_SV.log_softmax(-1)
        expected = sum(
            sum(logprobs_SV[world.state_of[ids[:t]], ids[t]] for t in range(len(ids))).exp()
            for ids, reward in zip(world.completions, world.reward_C, strict=True)
            if reward
        )
        (gradient_SV,) = torch.autograd.grad(expected, logits_SV)
        assert world.probability_C.sum() == pytest.approx(1, abs=1e-12)
        assert world.values[()] == pytest.approx(expected.detach().item(), abs=1e-12)
        np.testing.assert_allclose(world.true_gradient, gradient_SV.nan_to_num(0).ravel().numpy(), atol=1e-12)


def test_measure_finds_what_was_put_in(bench):
    truth = np.array([3.0, 4.0, 0.0])
    mean = 2 * truth + np.array([0.0, 0.0, 10.0])  # at 45 degrees
    noise = np.random.default_rng(0).normal(0, 3.0, (4000, 3))
    found = bench.measure(mean + noise, truth, batch=5, resamples=200, seed=0)
    exact = {"cosine": 0.5**0.5, "scale": 2.0, "bias": 5**0.5, "variance": 5 * 27.0, "SNR": 100 / 135}
    for name, value in exact.items():
        assert found[name].low < value < found[name].high
        assert found[name].value == pytest.approx(value, rel=0.05)


def test_leave_one_out_is_unbiased_and_the_mean_baseline_short_by_one_part_in_g(bench):
    row = next(row for row in bench.contenders({}, ["rloo"]))
    world = bench.enumerate_world(bench.TASKS[0], 0)
    pairs = np.array([(i, j) for i in range(len(world.completions)) for j in (0, 7, 500)])
    # Given o_j, the pairs' expectation over o_i is exact: weight each pair by the probability of its first member.
    weight = np.repeat(world.probability_C, 3) / 3
    rewards = world.reward_C[pairs]
    advantages = np.stack([rewards[:, 0] - rewards[:, 1], rewards[:, 1] - rewards[:, 0]])
    lengths = len(world.completions[0])
    first_member = world.gradient(pairs[:, 0], np.repeat(advantages[0] * weight, lengths))
    np.testing.assert_allclose(first_member, world.true_gradient, atol=1e-12)
    estimates = row.estimates(world, pairs[:4], 2)  # and the registered part gives these advantages
    by_hand = world.gradient(pairs[0], np.repeat(advantages[:, 0], lengths)) / 2
    np.testing.assert_allclose(estimates[0], by_hand, atol=1e-12)


def test_estimators_from_outside_and_newly_registered_ones_have_rows(bench, tmp_path, monkeypatch, capsys):
    (tmp_path / "outside_credit.py").write_text(
        "from rltrain.advantages.group import GroupConfig, group\n"
        "def plain(groups, options, context):\n"
        "    return group(groups, GroupConfig(scale='none'), context)\n"
        "def verls(token_level_rewards, response_mask, index):\n"
        "    rewards = token_level_rewards.sum(1)\n"
        "    baselines = [rewards[[j for j, other in enumerate(index) if other == one]].mean() for one in index]\n"
        "    advantages = (rewards - rewards.new_tensor(baselines))[:, None] * response_mask\n"
        "    return advantages, advantages\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    class BenchOnlyConfig(AdvantageConfig):
        """Not a dataclass of its own: it has no fields."""

    @register("advantage", "bench_only", BenchOnlyConfig)
    def refuses(groups, config, context):
        raise RuntimeError("no table will do")

    words = ["--completions", "128", "--batch", "32", "--groups", "4", "--resamples", "20"]
    words += ["--only", "dr_grpo", "tempo", "spae", "bench_only", "--custom", "outside_credit:plain"]
    words += ["--verl", "outside_credit:verls"]
    try:
        cells = bench.main([*words, "--plot", str(tmp_path / "plot.png")])
    finally:
        del config._PARTS["advantage", "bench_only"]
    columns = {(cell.task, cell.label): cell.columns for cell in cells}
    labels = {label for _, label in columns}
    assert {"dr_grpo", "tempo", "spae", "bench_only", "outside_credit:plain"} <= labels
    for task in bench.TASKS:
        assert columns[task.name, "outside_credit:plain"] == columns[task.name, "dr_grpo"]
        verls, dr_grpo = columns[task.name, "outside_credit:verls"], columns[task.name, "dr_grpo"]
        assert {key: one.value for key, one in verls.items()} == pytest.approx(
            {key: one.value for key, one in dr_grpo.items()}, rel=1e-5
        )
        assert columns[task.name, "bench_only"] == {}
        assert all(np.isfinite(one.value) for one in columns[task.name, "spae"].values())
    assert "Not measured: bench_only: no table will do" in capsys.readouterr().out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
