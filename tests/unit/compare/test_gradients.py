"""Estimators against a gradient that is known: the enumeration, the measures, the table, and judge() in a test."""

import dataclasses
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rltrain import registry
from rltrain.advantages.check import EstimatorError
from rltrain.advantages.estimator import estimator_of
from rltrain.advantages.group import GroupConfig, group
from rltrain.advantages.tempo import TempoConfig
from rltrain.compare.gradients import FAMILIES, Family, judge, judging
from rltrain.compare.gradients.__main__ import main
from rltrain.compare.gradients.families import enumerated
from rltrain.compare.gradients.judging import Estimates, Sampling, estimates, judge_on, measure, policy_of
from rltrain.compare.gradients.rows import contenders
from rltrain.compare.gradients.services import Table
from rltrain.config import AdvantageConfig
from rltrain.errors import ConfigError
from rltrain.registry import discover, register
from rltrain.types import Advantages, Need

ROOT = Path(__file__).parents[3]
FEW = {"completions": 128, "batch": 32, "resamples": 20}
SHORT = ["--completions", "128", "--batch", "32", "--groups", "4", "--resamples", "20"]


@pytest.fixture(autouse=True, scope="module")
def registered():
    discover()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_true_gradient_is_autograd_of_the_expected_reward(family):
    policy = enumerated(family, 3)
    logits_SV = torch.from_numpy(policy.policy_SV).log().requires_grad_()
    logprobs_SV = logits_SV.log_softmax(-1)
    expected = sum(
        sum(logprobs_SV[policy.state_of[ids[:t]], ids[t]] for t in range(len(ids)) if ids[:t] in policy.state_of).exp()
        for ids, reward in zip(policy.completions, policy.reward_C, strict=True)
        if reward
    )
    (gradient_SV,) = torch.autograd.grad(expected, logits_SV)
    assert policy.probability_C.sum() == pytest.approx(1, abs=1e-12)
    assert policy.values[()] == pytest.approx(expected.detach().item(), abs=1e-12)
    assert policy.expected_reward == pytest.approx(policy.values[()], abs=1e-12)
    np.testing.assert_allclose(policy.true_gradient, gradient_SV.nan_to_num(0).ravel().numpy(), atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_an_estimator_is_given_the_log_probs_of_the_table(family):
    """Those of each completion add up to the log of its probability."""
    policy, seen = enumerated(family, 1), {}

    def reads(groups, options, context):
        for each in groups:
            seen.update({completion.token_ids: completion for completion in each.completions})
        return group(groups, GroupConfig(), context)

    judge_on(policy, estimator_of(reads), Sampling(completions=4096, batch=256, resamples=2))
    probability = dict(zip(policy.completions, policy.probability_C, strict=True))
    assert len(seen) > 200
    for ids, completion in seen.items():
        assert len(completion.logprobs) == len(ids) and max(completion.written_logprobs) <= 0
        assert sum(completion.written_logprobs) == pytest.approx(np.log(probability[ids]), abs=1e-12)


def test_measure_finds_what_was_put_in():
    truth = np.array([3.0, 4.0, 0.0])
    mean = 2 * truth + np.array([0.0, 0.0, 10.0])  # at 45 degrees
    noise = np.random.default_rng(0).normal(0, 3.0, (4000, 3))
    tokens_K = np.random.default_rng(1).uniform(3, 5, 4000)
    columns = measure(Estimates(gradients_KD=mean + noise, tokens_K=tokens_K), truth, batch=5, resamples=200, seed=0)
    exact = {"cosine": 0.5**0.5, "scale": 2.0, "bias": 5**0.5, "variance": 5 * 27.0, "snr": 100 / 135}
    exact |= {"tokens": 4.0, "snr_per_token": 25 / 135}
    assert columns.keys() == exact.keys()
    for name, value in exact.items():
        assert columns[name].low < value < columns[name].high
        assert columns[name].estimate == pytest.approx(value, rel=0.05)


def test_leave_one_out_is_unbiased_and_the_mean_baseline_short_by_one_part_in_g():
    policy = enumerated(FAMILIES[0], 0)
    pairs = np.array([(i, j) for i in range(len(policy.completions)) for j in (0, 7, 500)])
    # Given o_j, the pairs' expectation over o_i is exact: weight each pair by the probability of its first member.
    weight = np.repeat(policy.probability_C, 3) / 3
    rewards = policy.reward_C[pairs]
    advantages = np.stack([rewards[:, 0] - rewards[:, 1], rewards[:, 1] - rewards[:, 0]])
    length = len(policy.completions[0])
    first_member = policy.gradient(pairs[:, 0], np.repeat(advantages[0] * weight, length))
    np.testing.assert_allclose(first_member, policy.true_gradient, atol=1e-12)
    (rloo,) = contenders([], ["rloo"])  # and the registered part gives these advantages
    by_hand = policy.gradient(pairs[0], np.repeat(advantages[:, 0], length)) / 2
    found = estimates(Table(policy=policy, seed=0), rloo.estimator, pairs[:4], 2)
    np.testing.assert_allclose(found.gradients_KD[0], by_hand, atol=1e-12)
    assert found.tokens_K.tolist() == [5.0] * 4


def numbers(table: str) -> dict[tuple[str, str], list[float]]:
    """By family and estimator, all numbers of a row."""
    rows, family = {}, ""
    for line in table.splitlines():
        family = line.split("**")[1] if line.startswith("**") else family
        if re.match(r"\| [^|]+ \| \d", line):
            label, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[family, label] = [
                float(number) for cell in cells for number in re.findall(r"[\d.]+(?:e[+-]?\d+)?", cell)
            ]
    return rows


def test_the_table_is_that_of_the_script_it_was(tmp_path, capsys):
    """Printed by scripts/bench/estimators.py at revision a6282de with these options; a last digit may round apart.

    Families, rows and the columns on tokens that came later are not in it.
    """
    words = ["--groups", "4", "--completions", "256", "--batch", "64", "--resamples", "50"]
    names = ["group", "reinforce_pp_baseline", "spae", "tempo"]
    main([*words, "--only", *names, "--table", str(tmp_path / "table.md"), "--plot", str(tmp_path / "plot.png")])
    before, now = (ROOT / "tests/vectors/gradients.md").read_text(), (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out.strip() == now.strip()
    titles = [line for line in now.splitlines() if line.startswith("**")]
    assert titles[:4] == [line for line in before.splitlines() if line.startswith("**")]
    expected, found = numbers(before), numbers(now)
    assert len(expected) == 4 * 8 and all(len(values) == 12 for values in expected.values())
    for key, values in expected.items():
        assert found[key][:12] == pytest.approx(values, rel=0.01, abs=0.002), key
        *_, snr, _, _, tokens, per_token, _, _ = found[key]
        assert per_token == pytest.approx(snr / tokens, rel=0.02)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


OUTSIDE = """
from rltrain.advantages.group import GroupConfig, group

def plain(groups, options, context):
    return group(groups, GroupConfig(scale=options.get("scale", "none")), context)

def broken(groups, options, context):
    return group(groups, GroupConfig(), context).values

def verls(token_level_rewards, response_mask, index):
    rewards = token_level_rewards.sum(1)
    baselines = [rewards[[j for j, other in enumerate(index) if other == one]].mean() for one in index]
    advantages = (rewards - rewards.new_tensor(baselines))[:, None] * response_mask
    return advantages, advantages
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "outside_credit.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "outside_credit"
    del sys.modules["outside_credit"]


def judgements_of(cells, label):
    return {cell.family: cell.judgement for cell in cells if cell.label == label}


def test_estimators_from_outside_and_newly_registered_ones_have_rows(outside, tmp_path, capsys):
    class BenchOnlyConfig(AdvantageConfig):
        """Not a dataclass of its own: it has no fields."""

    @register("advantage", "bench_only", BenchOnlyConfig)
    def refuses(groups, config, context):
        raise RuntimeError("no table will do")

    words = [*SHORT, "--only", "dr_grpo", "tempo", "bench_only", "--custom", f"{outside}:plain", f"{outside}:broken"]
    try:
        cells = main([*words, "--verl", f"{outside}:verls", "--plot", str(tmp_path / "plot.png")])
    finally:
        del registry._PARTS["advantage", "bench_only"]
    labels = [cell.label for cell in cells if cell.family == FAMILIES[0].name]
    ours = ["bench_only", "dr_grpo", "tempo", "tempo, no std"]
    assert labels == [*ours, f"{outside}:plain", f"{outside}:broken", f"{outside}:verls"]
    dr_grpo = judgements_of(cells, "dr_grpo")
    assert judgements_of(cells, f"{outside}:plain") == dr_grpo and len(dr_grpo) == len(FAMILIES)
    for name, judgement in judgements_of(cells, f"{outside}:verls").items():  # in fp32
        for column in ("cosine", "scale", "bias", "variance", "snr", "tokens", "snr_per_token"):
            assert dataclasses.astuple(getattr(judgement, column)) == pytest.approx(
                dataclasses.astuple(getattr(dr_grpo[name], column)), rel=1e-5, abs=1e-6
            )
    printed = capsys.readouterr()
    assert "Not measured: bench_only: RuntimeError: no table will do" in printed.out
    assert f"Not measured: {outside}:broken: advantage.import_path={outside}:broken: returned a list" in printed.out
    assert printed.err.count("Traceback") == 1  # of the one that raised, not of the one that broke the contract


def test_options_reach_the_estimators_from_outside(outside, tmp_path):
    words = [*SHORT, "--only", "grpo", "dr_grpo", "--custom", f"{outside}:plain", "--options", "{scale: std}"]
    cells = main([*words, "--plot", str(tmp_path / "plot.png")])
    assert judgements_of(cells, f"{outside}:plain") == judgements_of(cells, "grpo") != judgements_of(cells, "dr_grpo")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--groups", "3"], "batch must divide completions, and group_size must divide batch"),
        (["--completions", "300"], "batch must divide completions"),
        (["--completions", "256"], "the intervals need at least two batches; raise completions or lower batch"),
        (["--only", "gpro"], "--only gpro: unknown; choose among dr_grpo, entropy_mask, gdpo, "),
        (["--families", "fork"], "--families fork: unknown; choose among 'decisive token', 'two needed tokens', "),
        (["--custom", "nothing_here:f"], "no module named nothing_here; install it or add its folder to PYTHONPATH"),
        (["--options", "gamma"], "--options gamma: not a YAML mapping; write '{gamma: 0.9}'"),
        (["--options", "{gamma"], "--options {gamma: not a YAML mapping"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(words, message):
    with pytest.raises(ConfigError) as caught:
        main(words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_module_is_an_entry_point():
    command = [sys.executable, "-m", "rltrain.compare.gradients", "--only", "gpro"]
    wrong = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2 and wrong.stderr.startswith("config error: --only gpro: unknown")


# --- judge() -----------------------------------------------------------------------------------------------------


def halved(groups, options, context):
    """The group advantage without its standard deviation, by a factor: the direction stays, the length does not."""
    values = group(groups, GroupConfig(baseline="leave_one_out", scale="none"), context).values
    return Advantages(values=[[options["by"] * row_T for row_T in rows] for rows in values])


def test_judge_returns_a_record_per_family():
    whole = judge("group", {"baseline": "leave_one_out", "scale": "none"}, **FEW)
    half = judge(halved, {"by": 0.5}, **FEW)
    assert list(whole) == [family.name for family in FAMILIES]
    for name, judgement in whole.items():
        assert (judgement.family, judgement.group_size) == (name, 4)
        assert half[name].cosine == judgement.cosine  # halves are exact
        assert half[name].snr == judgement.snr
        assert half[name].scale.estimate == judgement.scale.estimate / 2
        assert half[name].variance.estimate == judgement.variance.estimate / 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        whole["decisive token"].family = "another"


def test_a_config_a_name_and_the_table_agree(tmp_path):
    by_config, by_name = judge(TempoConfig(normalize_std=False), **FEW), judge("tempo", {"normalize_std": False}, **FEW)
    cells = main([*SHORT, "--only", "tempo, no std", "--plot", str(tmp_path / "plot.png")])
    assert by_config == by_name == judgements_of(cells, "tempo, no std")


def test_judge_says_whether_an_estimator_is_biased():
    """What the page promises a user's test: leave-one-out's interval holds 0, the mean baseline's does not."""
    families = FAMILIES[:1]
    unbiased = judge(GroupConfig(baseline="leave_one_out", scale="none"), families=families, group_size=2)
    biased = judge(GroupConfig(scale="none"), families=families, group_size=2)
    assert unbiased["decisive token"].bias.low == 0
    assert biased["decisive token"].bias.low > 0.4  # (G - 1)/G of the gradient: half is missing
    assert biased["decisive token"].scale.low < 0.5 < biased["decisive token"].scale.high


def test_a_family_of_the_users_own():
    first = Family(name="first token", says="token 1 of 2 is right", length=2, correct=lambda ids: ids[0] == 1)
    (judgement,) = judge("group", families=[first], **FEW).values()
    assert judgement.family == "first token"
    assert len(policy_of(first, 0).completions) == 16
    assert judgement.cosine.high == pytest.approx(1, abs=0.05)


def wrong_length(groups, options, context):
    return Advantages(values=[[torch.zeros(1) for _ in each.completions] for each in groups])


def raises(groups, options, context):
    raise KeyError("gamma")


def test_judge_raises_what_the_estimator_does():
    with pytest.raises(EstimatorError, match=r"completion 0: has a tensor of shape \(1,\), expected a tensor of shape"):
        judge(wrong_length, **FEW)
    with pytest.raises(KeyError, match="gamma"):
        judge(raises, **FEW)
    with pytest.raises(ConfigError, match="batch=256, group_size=4: batch must divide completions"):
        judge("group", completions=100)


def test_what_a_table_does_not_give_is_named(monkeypatch):
    monkeypatch.setattr(judging, "PROVIDED", frozenset({Need.PROBES}))
    estimator = dataclasses.replace(estimator_of("group"), needs=frozenset({Need.PROBES, Need.SCORER}))
    with pytest.raises(ConfigError, match="advantage=group: needs SCORER, which a tabular policy does not give"):
        judge_on(policy_of(FAMILIES[0], 0), estimator, Sampling(**FEW))


def test_the_pages_test_passes(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/estimators.md").read_text(), re.DOTALL)
    path = tmp_path / "test_my_estimator.py"
    path.write_text(block)
    tests = {name: value for name, value in runpy.run_path(str(path)).items() if name.startswith("test_")}
    assert len(tests) == 2
    for run in tests.values():
        run()
