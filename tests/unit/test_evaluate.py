"""What ``rltrain evaluate`` counts and prints, on groups worked out by hand."""

import json
import math

import pytest
import torch
from tiny_run import config

from rltrain import evaluate
from rltrain.config import EvaluationConfig


@pytest.mark.parametrize(("texts", "right", "share"), [
    (["1+1=2", "so 2", "= 2.0"], [True, True, True], 1.0),  # "so 2" is another answer; 2 and 2.0 are one
    (["a\n\\boxed{7}", "\\boxed{7}", "\\boxed{8}"], [False, False, True], 0.0),
    (["=3", "=4"], [True, False], 0.5),  # equally frequent: the mean
    (["", " \n"], [False, False], 0.0),  # nobody votes
])  # fmt: skip
def test_the_majority_votes(texts, right, share):
    assert evaluate.majority(texts, right) == share


FACTS = {"model": "some/folder", "data": "small_integers", "split": "test", "drawn": "4 samples each at 1"}
SAMPLED = {"eval_accuracy": 0.5, "eval_accuracy_se": 0.125, "eval_problems": 16.0, "eval_pass@2": 0.75}
GREEDY = {"eval_accuracy": 0.625, "eval_accuracy_se": 0.1, "eval_problems": 16.0}


def test_the_table_names_model_data_split_and_n():
    settings = EvaluationConfig(samples=4, temperature=1.0)
    assert evaluate.table(FACTS, SAMPLED, GREEDY, settings).splitlines() == [
        "model                   some/folder",
        "data                    small_integers",
        "split                   test",
        "problems (n)            16",
        "",
        " " * 24 + "     4 samples each at 1                  greedy",
        "avg@4 (accuracy)                 0.5000 ± 0.1250         0.6250 ± 0.1000",
        "pass@2                                    0.7500                       -",
    ]


def test_a_greedy_evaluation_has_a_single_column():
    lines = evaluate.table(FACTS, GREEDY, GREEDY, EvaluationConfig()).splitlines()
    assert lines[-1] == "avg@1 (accuracy)                 0.6250 ± 0.1000"


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    keys = ["evaluation.samples=2", "evaluation.temperature=1.0", "rewards.answer.probability=0.5"]
    with torch.no_grad():
        evaluate.main(config(tmp_path / "run", *keys))
    written = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert (written["model"], written["data"], written["split"]) == ("tiny (not trained)", "random_calculation", "test")
    assert written["eval_problems"] == written["greedy"]["eval_problems"] == 6
    assert 0 <= written["eval_maj@2"] <= 1 and written["eval_pass@2"] >= written["eval_accuracy"]
    greedy = written["greedy"]["eval_accuracy"]  # n = 6 coins: std of ddof 1 over sqrt(6)
    assert written["greedy"]["eval_accuracy_se"] == pytest.approx(math.sqrt(greedy * (1 - greedy) / 5))
    assert "2 samples each at 1" in capsys.readouterr().out
