"""Leaving completions early: cues, probe, threshold, guarantee, and a whole evaluation on a tiny model."""

import json
import math

import pytest
import torch

from rltrain import cli, early_exit, evaluate, trainer
from rltrain.early_exit import CuedCompletion, Probe, closed, conformal_threshold, cue_positions, exit_metrics
from rltrain.errors import ConfigError, RunError
from rltrain.runtime.records import EarlyExitConfig


@pytest.mark.parametrize(
    ("count", "delta", "rank"),
    [(9, 0.1, 9), (19, 0.1, 18), (10, 0.1, 10), (99, 0.05, 95), (1, 0.5, 1), (4, 0.2, 4)],
)
def test_the_threshold_is_the_stated_order_statistic(count, delta, rank):
    scores = torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()
    assert conformal_threshold(scores, delta) == rank - 1  # scores are 0..n-1


@pytest.mark.parametrize(("count", "delta", "least"), [(8, 0.1, 9), (0, 0.5, 1), (98, 0.01, 99)])
def test_too_few_for_the_guarantee_are_refused(count, delta, least):
    with pytest.raises(RunError, match=rf"calibration has {count} completions .* the guarantee needs {least};"):
        conformal_threshold(list(range(count)), delta)
    conformal_threshold(list(range(least)), delta)


def test_the_guarantee_holds_in_the_mean_over_calibrations():
    """P(new score > threshold) = 1 - k/(n + 1) exactly, for exchangeable scores without ties: here 1 - 18/20."""
    generator = torch.Generator().manual_seed(0)
    scores_RN = torch.rand(4000, 20, generator=generator)
    above = [float(row[-1]) > conformal_threshold(row[:-1].tolist(), 0.1) for row in scores_RN]
    assert sum(above) / len(above) == pytest.approx(0.1, abs=4 * math.sqrt(0.1 * 0.9 / 4000))


def test_cues_are_whole_words_or_any_ends_and_never_the_last_token():
    texts = ["12", "\n", " Wa", "it", ",", " awaiting", " wait", "ress", " hmm", "\n"]
    assert cue_positions(texts, ["\n", "wait"], most=9) == (2, 4, 7)
    assert cue_positions(texts, ["\n", "wait", "hmm"], most=3) == (2, 4, 7)
    assert cue_positions(["hmm", " so", ".\n\nBut"], ["hmm", "\n"], most=9) == (1,)
    assert cue_positions([], ["\n"], most=9) == cue_positions(["\n"], ["\n"], most=9) == ()


def test_an_answer_ends_where_its_brace_closes():
    assert closed("\\boxed{", "\\frac{1}{2}} and more}") == "\\frac{1}{2}}"
    assert closed("\\boxed{", "12") == "12"
    assert closed("Answer: ", "12} x") == "12} x"


def test_the_probe_is_the_minimum_of_its_loss():
    generator = torch.Generator().manual_seed(1)
    states_ND = torch.randn(60, 4, generator=generator) * torch.tensor([1.0, 5.0, 0.1, 0.0]) + 3
    right_N = (states_ND[:, 0] + torch.randn(60, generator=generator) > 3.2).double()
    probe = Probe.fitted(states_ND, right_N, l2=0.05)
    errors_N = torch.sigmoid(probe.scores(states_ND)) - right_N
    features_ND = (states_ND.double() - states_ND.double().mean(0)) / states_ND.double().std(0, correction=0)
    slopes_D = (features_ND[:, :3] * errors_N[:, None]).mean(0) + 0.05 * probe.weights_D[:3]
    torch.testing.assert_close(slopes_D, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-6)
    assert float(errors_N.mean()) == pytest.approx(0, abs=1e-6)
    assert float(probe.weights_D[3]) == 0.0 and float(probe.weights_D[0]) > 0.5
    torch.testing.assert_close(probe.scores(states_ND * torch.tensor([1, 1, 1, 1.0])), probe.scores(states_ND))


def completion(tokens, right, cues):
    """``cues`` are (position, tokens of the answer, whether it is right, score)."""
    return CuedCompletion(
        tokens=tokens,
        right=right,
        positions=tuple(cue[0] for cue in cues),
        answer_tokens=tuple(cue[1] for cue in cues),
        early_right_K=torch.tensor([cue[2] for cue in cues], dtype=torch.bool),
        states_KD=torch.tensor([[cue[3]] for cue in cues]).view(-1, 1),
    )


IDENTITY = Probe(
    mean_D=torch.zeros(1, dtype=torch.float64),
    scale_D=torch.ones(1, dtype=torch.float64),
    weights_D=torch.ones(1, dtype=torch.float64),
    bias=torch.zeros((), dtype=torch.float64),
)


def test_what_exits_do_to_completions_by_hand():
    held_out = [
        completion(40, True, [(10, 3, False, 0.1), (20, 4, True, 0.9), (30, 4, True, 2.0)]),  # left at 20: 24 tokens
        completion(20, False, [(5, 3, False, 0.8)]),  # left at a wrong answer: 8 tokens
        completion(30, True, [(5, 3, False, 0.5)]),  # at the threshold, which is not above it
        completion(10, False, []),
    ]
    values = exit_metrics(held_out, IDENTITY, threshold=0.5, delta=0.1)
    assert values["tokens_saved"] == pytest.approx(1 - (24 + 8 + 30 + 10) / 100)
    assert (values["accuracy_whole"], values["accuracy"], values["exits"]) == (0.5, 0.5, 0.5)
    assert values["completions_with_wrong_cues"] == 3  # of which only the second has one above the threshold
    assert values["wrong_exit_share"] == pytest.approx(1 / 3)
    assert values["wrong_exit_low"] < 1 / 3 < values["wrong_exit_high"]


def test_a_fit_without_right_and_wrong_cues_is_refused():
    only = [completion(9, True, [(3, 2, True, 1.0)])]
    for fit in ([], only):
        with pytest.raises(RunError, match=f"of {len(fit)} cues for the probe {len(fit)} have a right answer"):
            early_exit.fit_and_calibrate(fit, only, EarlyExitConfig(delta=0.5))


TINY = ["model.hidden_size=32", "model.layers=1", "model.heads=2", "model.intermediate_size=64", "data=small_integers"]
# A coin judges: so small a model writes nothing right, and the test knows how many cues there are.
ASKED = [
    "reward@rewards.answer=random",
    f"evaluation.early_exit.cues={list('0123456789+-*')}",
    "evaluation.problems=12",
]
ASKED += ["evaluation.early_exit.problems=40", "sampling.max_new_tokens=24", "evaluation.early_exit.answer_tokens=4"]
ASKED += ["evaluation.temperature=1.0", "evaluation.samples=1"]


def test_an_evaluation_measures_early_exits(tmp_path, capsys):
    config = cli.compose([*TINY, *ASKED, "evaluation.early_exit.delta=0.3", f"run_dir={tmp_path}"])
    evaluate.main(config)
    values = json.loads((tmp_path / "evaluation.json").read_text())["early_exit"]
    assert values["delta"] == 0.3 and 0 <= values["exits"] <= 1 and values["tokens_saved"] <= 1
    assert values["completions_with_wrong_cues"] > 0
    assert values["accuracy_whole"] == pytest.approx(
        json.loads((tmp_path / "evaluation.json").read_text())["eval_accuracy"]
    )
    assert "early exit\ndelta" in capsys.readouterr().out


def test_states_are_those_of_the_completions_own_forward(tmp_path):
    config = cli.compose([*TINY, *ASKED, f"run_dir={tmp_path}"])
    policy = evaluate.load_policy(config.model)
    asking = early_exit.Asking(
        rollout=evaluate.build_engine(config.rollout, config.sampling, policy, seed=0),
        policy=policy,
        rewards=config.rewards,
        context=evaluate.Context(tokenizer=policy.tokenizer),
        config=config.evaluation.early_exit,
        step=-1,
        sampling=config.sampling,
    )
    rows = [((5, 6, 7), (8, 9, 10, 11), (2, 3)), ((5,), (12, 13), ()), ((6, 7), (9, 9, 14), (1,))]
    for (prompt, ids, cuts), states_KD in zip(rows, asking._states_of(rows), strict=True):
        alone_TD = policy.model(torch.tensor([[*prompt, *ids]]), output_hidden_states=True).hidden_states[-1][0]
        expected = alone_TD[[len(prompt) + cut - 1 for cut in cuts]]
        torch.testing.assert_close(states_KD, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["evaluation.early_exit.delta=1"], ConfigError, r"early_exit.delta=1.*: must lie in \[0, 1\)"),
        (["evaluation.early_exit.cues=[]"], ConfigError, "early_exit.cues: a cue is empty, or there is none"),
        (["evaluation.early_exit.delta=0.001"], RunError, "the guarantee needs 999"),
        (["evaluation.early_exit.delta=0.1", "evaluation.cautious=true"], ConfigError, "is of plain sampling"),
        (
            ["evaluation.early_exit.delta=0.1", "environment=calculator", "environment.reply_tokens=8"],
            ConfigError,
            "does not follow turns",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, more, error, message):
    with pytest.raises(error, match=message):
        evaluate.main(cli.compose([*TINY, *ASKED, *more, f"run_dir={tmp_path}"]))


def test_a_training_run_refuses_what_it_does_not_measure(tmp_path):
    config = cli.compose([*TINY, *ASKED, "evaluation.early_exit.delta=0.1", "steps=1", f"run_dir={tmp_path}"])
    with pytest.raises(ConfigError, match="early_exit.delta=0.1: is of rltrain evaluate alone"):
        trainer.fit(config)
