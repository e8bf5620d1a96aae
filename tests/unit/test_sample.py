"""``rltrain sample``: probabilities are the model's, the run's reward judges, colours are optional."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_run import config
from turn_groups import called, failed, group

from rltrain import cli
from rltrain.commands import sample
from rltrain.errors import ConfigError
from rltrain.policy.load import config_of, load_policy, save_policy
from rltrain.registry import parts
from rltrain.rewards.code import CodeConfig
from rltrain.rewards.math import MathConfig
from rltrain.rewards.random_calculation import RandomCalculationRewardConfig
from rltrain.runs import run_folder
from rltrain.types import Completion, Group, Problem, Prompt


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a cold start and no checkpoint."""
    folder = tmp_path_factory.mktemp("sampled") / "run"
    run_config = config(folder, "rewards.answer.probability=1.0")
    run_folder.write_provenance(folder, run_config)
    save_policy(load_policy(run_config.model), folder / "cold_start")
    return folder


def test_probabilities_are_those_of_the_model(run):
    source = sample.source_of(str(run))
    group = sample.sample(source, "1+2=", n=2, seed=3, answer="3")
    policy = load_policy(source.model, path=source.path)
    assert group.rewards_G.tolist() == [1.0, 1.0]
    for completion in group.completions:
        ids = torch.tensor([[*group.prompt.token_ids, *completion.token_ids]])
        logprobs = policy.model(ids).logits[0].detach().log_softmax(-1)  # a row is of the token after it
        first = len(group.prompt.token_ids) - 1
        expected = [float(logprobs[first + t, token]) for t, token in enumerate(completion.token_ids)]
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    assert sample.sample(source, "1+2=", n=2, seed=3).completions == group.completions  # the seed decides


@pytest.mark.parametrize("word", ["model.lora.rank=2", "model.introspection.head=true"])
def test_a_model_comes_back_from_the_plain_form_of_its_run(word, tmp_path):
    made = config(tmp_path, word)
    assert config_of(run_folder.resolved(made)["model"]) == made.model


def test_the_command_prints_rewards_and_probabilities(run, capsys):
    sample.main([str(run), "1+2=", "--answer", "3", "--n", "1", "--max-new-tokens", "3", "--seed", "1"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("[1] reward 1, ") and "probability" in head
    assert lines[-1].startswith("  '")


GROUP = Group(
    prompt=Prompt(problem=Problem(id="a", prompt="", answer=""), token_ids=(1,)),
    completions=(Completion(token_ids=(5, 6), logprobs=(math.log(0.5), math.log(0.95)), finish="length", text="a\nb"),),
    notes={"tokens": [["a\n", "b"]]},
)


def test_text_with_and_without_colours():
    head = "[1] 2 tokens, probability 0.475, cut at the limit"
    assert sample.shown(GROUP, colours=False).splitlines() == [head, "a", "b", "  'a\\n' 0.50  'b' 0.95"]
    assert sample.shown(GROUP, colours=True).splitlines() == [head, "\x1b[30;46ma\x1b[0m", "\x1b[30;46m\x1b[0mb"]


def test_what_the_model_read_has_no_probability():
    """Of ``ab`` read ``c`` wrote ``d``: e^-0.5 · e^-0.25 · e^-1 = 0.174."""
    made = replace(group(called(), failed()), rewards_G=None, notes={"tokens": [list("abcd"), list("aca")]})
    first, second = (block.splitlines() for block in sample.shown(made, colours=False).split("\n\n"))
    assert first == [
        "[1] 4 tokens, probability 0.174",
        "abcd",
        "  'a' 0.61  'b' 0.78  'c' read  'd' 0.37",
        "  turn 1: 2 tokens, calls, read 1 tokens, reward 0.5",
        "  turn 2: 1 tokens",
    ]
    assert second[-2:] == [
        "  turn 1: 1 tokens, calls, read 1 tokens, reward -1, failed: error",
        "  turn 2: 1 tokens, calls, failed: timeout",
    ]


def test_what_cannot_be_sampled_is_named(run, tmp_path):
    (tmp_path / "config.yaml").write_text("name: empty\n")
    with pytest.raises(ConfigError, match="holds no checkpoint and no cold start"):
        sample.source_of(str(tmp_path))
    with pytest.raises(ConfigError, match="--answer: .* is no run with rewards"):
        sample.main([str(run / "cold_start"), "1+2=", "--answer", "3"])


@pytest.mark.parametrize("reward", [
    RandomCalculationRewardConfig(kind="exact", weight=2.0), CodeConfig(kind="binary"), MathConfig(),
], ids=["random_calculation", "code", "math"])  # fmt: skip
def test_rewards_are_known_from_the_plain_form_of_a_run(reward):
    """Two of them have a key ``kind`` of their own, which stands where others have the part's name."""
    config = cli.compose(["+experiment=quickstart"])
    config.rewards = {"answer": reward}
    plain = run_folder.resolved(config)["rewards"]["answer"]
    known = {part.name: part.config for part in parts("reward")}
    assert sample._reward(known, "answer", dict(plain)) == reward
