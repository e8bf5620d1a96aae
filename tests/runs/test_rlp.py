"""RLP as a whole: the reward against plain forwards, where the gradient goes, exact resume, two ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import THINKING
from tiny_run import metrics

from rltrain import cli, trainer
from rltrain.batching.collate import collate
from rltrain.data.text import CutConfig, Document
from rltrain.errors import ConfigError
from rltrain.policy.encode import encode
from rltrain.policy.load import load_policy
from rltrain.policy.logprobs import LogprobModel
from rltrain.policy.scorer import Scorer
from rltrain.policy.tiny import TinyConfig
from rltrain.rewards.information_gain import InformationGainConfig, information_gain_reward, thought_request
from rltrain.rewards.scoring import score
from rltrain.runs import checkpoint
from rltrain.types import Completion, Context, Group, Problem, Prompt

ROOT = Path(__file__).parents[2]
MODEL = TinyConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64)


@pytest.fixture(scope="module")
def policies():
    return load_policy(MODEL), load_policy(
        TinyConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64, init_seed=1)
    )


def group_of(policy, *thoughts, horizon=1):
    """Thoughts given as text; those without a closing tag were cut at the limit, or ended with EOS."""
    config = CutConfig(min_prefix=4, max_prefix=4, horizon=horizon)
    prompt = encode(policy, Document(id="d", prompt="3+4=7+0", answer="", config=config), MODEL)
    completions = []
    for thought in thoughts:
        ids = tuple(policy.tokenizer(thought)["input_ids"])
        stopped = thought.endswith(("</think>", "<eos>"))
        text = thought.removesuffix("<eos>")
        completions.append(
            Completion(token_ids=ids, logprobs=(-1.0,) * len(ids), finish="stop" if stopped else "length", text=text)
        )
    return Group(prompt=prompt, completions=tuple(completions))


def context_of(policies, scorer=None) -> Context:
    theta, phi = (LogprobModel(one.model, temperature=0.7) for one in policies)
    return Context(tokenizer=policies[0].tokenizer, scorer=scorer or Scorer(theta, phi, token_budget=64))


def logprob(policy, before: str, target: str) -> float:
    """log p of each character after the text before it, one plain forward each, summed."""
    total = 0.0
    for character in target:
        ids = torch.tensor([policy.tokenizer(before)["input_ids"]])
        with torch.no_grad():
            logits = policy.model(ids).logits[0, -1]
        total += float(logits.log_softmax(-1)[policy.tokenizer(character)["input_ids"][0]])
        before += character
    return total


@pytest.mark.parametrize("horizon", [1, 2])
def test_rewards_equal_plain_forwards_at_the_index_of_the_target(policies, horizon):
    """Closed, empty, cut and stopped thoughts: the latter two are closed for scoring, EOS dropped."""
    group = group_of(policies[0], "12</think>", "</think>", "12", "1<eos>", horizon=horizon)
    (rewards,) = information_gain_reward([group], InformationGainConfig(), context_of(policies)).scores
    target = "7+0"[:horizon]
    baseline = logprob(policies[1], "3+4=", target)
    texts = ["12</think>", "</think>", "12</think>", "1</think>"]
    expected = [logprob(policies[0], "3+4=<think>" + text, target) - baseline for text in texts]
    assert rewards == pytest.approx(expected, abs=1e-5)


def test_discount_weighs_later_targets(policies):
    group = group_of(policies[0], "1</think>", horizon=2)
    (rewards,) = information_gain_reward([group], InformationGainConfig(discount=0.5), context_of(policies)).scores
    first = logprob(policies[0], "3+4=<think>1</think>", "7") - logprob(policies[1], "3+4=", "7")
    second = logprob(policies[0], "3+4=<think>1</think>7", "+") - logprob(policies[1], "3+4=7", "+")
    assert rewards == pytest.approx([first + 0.5 * second], abs=1e-5)


def test_notes_hold_the_gain_on_each_target_token(policies):
    group = group_of(policies[0], "1</think>", "2</think>", horizon=2)
    result = information_gain_reward([group], InformationGainConfig(discount=0.5), context_of(policies))
    (notes,) = result.notes
    assert notes["position"] == [[4], [4]]
    assert notes["target_tokens"] == [["7", "+"]] * 2
    assert result.scores[0] == pytest.approx([first + 0.5 * second for first, second in notes["target_gain"]])


def test_metrics_count_unclosed_thoughts_and_positive_gains(policies):
    group = group_of(policies[0], "12</think>", "12", "1<eos>", "3</think>")
    result = information_gain_reward([group], InformationGainConfig(), context_of(policies))
    assert result.metrics["information_gain/share_unclosed"].total == 2
    assert result.metrics["information_gain/share_positive"].total == sum(r > 0 for r in result.scores[0])
    assert result.metrics["information_gain/mean"].total == pytest.approx(sum(result.scores[0]))


class FixedScorer:
    """Log-probs of -1 for the texts without a thought, and given ones for the thoughts."""

    def __init__(self, *thoughts):
        self.thoughts = thoughts

    def policy(self, requests):
        return [[torch.tensor([value])] for value in self.thoughts]

    def phi(self, requests):
        return [[torch.tensor([-1.0])] for _ in requests]


def test_a_thought_is_right_where_its_gain_is_positive(policies):
    """Gains 0.5, -2, 0 and 0.25, of any size below 1: right is their sign, for accuracy and for the group alike."""
    group = group_of(policies[0], "1</think>", "2</think>", "3</think>", "4</think>")
    context = context_of(policies, FixedScorer(-0.5, -3.0, -1.0, -0.75))
    assert information_gain_reward([group], InformationGainConfig(), context).right == [[True, False, False, True]]
    (scored,), metrics = score([group], {"gain": InformationGainConfig()}, context)
    assert scored.rewards_G.tolist() == [0.5, -2.0, 0.0, 0.25]
    assert scored.right_G.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert (metrics["accuracy"].total, metrics["accuracy"].count) == (2, 4)


def test_only_sampled_thought_tokens_carry_loss(policies):
    """Not the prefix, not the forced opening tag, not the forced closing tag, not the target."""
    group = group_of(policies[0], "12</think>", "45")
    (batch,), _ = collate(
        [group], [[torch.ones(3), torch.ones(2)]], aggregation="sequence", token_budget=64, max_new_tokens=8
    )
    assert policies[0].tokenizer.decode(batch.targets_N) == "12</think>45"
    assert (
        policies[0]
        .tokenizer.decode(thought_request(group.prompt, group.completions[1]).token_ids)
        .endswith("45</think>7")
    )


def test_prompts_without_a_target_are_a_config_error(policies):
    group = Group(prompt=Prompt(problem=Problem(id="q1", prompt="", answer=""), token_ids=(5,)), completions=())
    with pytest.raises(ConfigError, match="q1 has none; choose text data"):
        information_gain_reward([group], InformationGainConfig(), context_of(policies))


def test_thoughts_that_go_on_after_their_end_are_a_config_error(policies):
    group = group_of(policies[0], "1</think>2</think>")
    with pytest.raises(ConfigError, match="sampling.stop: lacks '</think>'"):
        information_gain_reward([group], InformationGainConfig(), context_of(policies))


def run(folder, *overrides):
    trainer.fit(cli.compose([*THINKING, f"run_dir={folder}", *overrides]))
    return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return run(tmp_path_factory.mktemp("rlp") / "run")


def test_the_policy_leaves_its_ema_behind(unbroken):
    lines = metrics(unbroken)[1:]
    assert all(line["grad_norm"] > 0 for line in lines)
    assert lines[0]["scorer/ema_distance"] > 0
    assert lines[0]["information_gain/mean"] == pytest.approx(lines[0]["reward"])
    assert "eval_reward" in metrics(unbroken)[0]


def test_resume_is_bit_for_bit_ema_included(unbroken, tmp_path):
    run(tmp_path / "run", "steps=2")
    run(tmp_path / "run")
    assert metrics(tmp_path / "run")[3:] == metrics(unbroken)[3:]
    saved, expected = (checkpoint.list_checkpoints(folder)[-1] for folder in (tmp_path / "run", unbroken))
    for name in ("policy/model.safetensors", "tensors.safetensors"):
        ours, theirs = load_file(saved.path / name), load_file(expected.path / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_saved_ema_is_between_the_start_and_the_policy(unbroken):
    """decay 0.9, four steps: neither the initial weights nor the final ones."""
    saved = checkpoint.list_checkpoints(unbroken)[-1]
    ema, final = load_file(saved.path / "tensors.safetensors"), load_file(saved.policy / "model.safetensors")
    start = dict(LogprobModel(load_policy(MODEL).model, temperature=1.0).named_parameters())
    name = "model.model.layers.0.mlp.up_proj.weight"
    to_start = (ema[name] - start[name]).norm()
    to_final = (ema[name] - final[name.removeprefix("model.")]).norm()
    assert 0 < to_start < to_final


def test_a_damaged_ema_is_noticed(unbroken):
    saved = checkpoint.list_checkpoints(unbroken)[0]
    path = saved.path / "tensors.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert checkpoint.find_damage(saved) == "tensors.safetensors has another checksum"
    path.write_bytes(content)


def test_lora_adapters_have_their_own_ema(tmp_path):
    run(tmp_path / "run", "model.lora.rank=4", "steps=1")
    saved = checkpoint.list_checkpoints(tmp_path / "run")[-1]
    assert all("lora_" in name for name in load_file(saved.path / "tensors.safetensors"))


def test_the_first_gain_is_that_of_the_policy_over_itself(tmp_path):
    """phi starts as theta, so an EMA, a frozen model and the policy itself give the same first step."""
    first = [metrics(run(tmp_path / kind, f"scorer.kind={kind}", "steps=1"))[1] for kind in ("ema", "frozen", "policy")]
    assert [line["reward"] for line in first] == pytest.approx([first[0]["reward"]] * 3, abs=1e-6)


SHARDED = ["deepspeed.zero_stage=3"] + [  # and every weight cut up, however small
    f"+deepspeed.extra.zero_optimization.stage3_{kind}_persistence_threshold=0" for kind in ("param", "model")
]


@pytest.mark.parametrize("options", [[], pytest.param(SHARDED, marks=pytest.mark.slow)], ids=["replicated", "sharded"])
def test_two_ranks_give_the_rewards_of_one(unbroken, tmp_path, options):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "rltrain.train"]
    command = [sys.executable, *launcher, *THINKING, f"run_dir={tmp_path / 'two'}", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    for line, expected in zip(metrics(tmp_path / "two"), metrics(unbroken), strict=True):
        line.pop("padding_share", None), expected.pop("padding_share", None)  # the layout may differ
        assert line == pytest.approx(expected, rel=2e-4, abs=5e-6), line["step"]
    ours, theirs = (
        load_file(checkpoint.list_checkpoints(folder)[-1].path / "tensors.safetensors")
        for folder in (tmp_path / "two", unbroken)
    )
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=5e-5)
