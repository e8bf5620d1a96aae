"""Cautious decoding: the number of trials, the segment that is kept, and where it is refused."""

import pytest
import torch
from local_engine import EOS, PROMPTS, Policy, engine, ids, model, plain_logprobs, tokenizer
from tiny_run import config as tiny_config

from rltrain import cli, trainer
from rltrain.config import SamplingConfig
from rltrain.errors import ConfigError
from rltrain.rollout.cautious import CautiousRollout, likeliest, trials
from rltrain.types import Completion


@pytest.mark.parametrize(("entropy", "count"), [
    (0.0, 1), (0.01, 1), (0.17, 1), (0.18, 2), (0.755, 5), (1.49, 9), (1.5, 10), (4.0, 10),
])  # fmt: skip
def test_trials_of_an_entropy(entropy, count):
    """1 + 9·(0.755 - 0.01)/1.49 = 5.5, and 1 + 9·(0.17 - 0.01)/1.49 = 1.97."""
    assert trials(entropy) == count


def completion(*logprobs):
    return Completion(token_ids=(1,) * len(logprobs), logprobs=logprobs, finish="stop")


def test_the_least_perplexity_is_of_the_mean_log_prob():
    short, long, same = completion(-0.5), completion(-0.1, -0.2, -0.6), completion(-0.3)
    assert likeliest([short, long, same]) is long  # mean -0.3, as that of the last; the first of them counts


def careful(**settings):
    sampling = SamplingConfig(max_new_tokens=12, temperature=1.0)
    policy = Policy(model("llama"), tokenizer(), (EOS,))
    return CautiousRollout(engine("llama", **settings), policy, sampling, marks=["e", "="], seed=7)


def test_segments_are_the_likeliest_of_their_trials():
    with torch.no_grad():
        rollout = careful()
        groups = rollout.generate(PROMPTS[:3], step=0, group_size=2)
        again = careful(max_rows=5).generate(PROMPTS[:3], step=0, group_size=2)
    assert ids(groups) == ids(again)
    assert rollout.trials > rollout.segments >= 6
    with torch.no_grad():
        cold = SamplingConfig(max_new_tokens=12, temperature=0.01)
        group = careful().generate(PROMPTS[:1], step=0, group_size=1, sampling=cold)[0]
        greedy = SamplingConfig(max_new_tokens=12, temperature=0.0)
        assert ids([group]) == ids(engine("llama").generate(PROMPTS[:1], step=0, group_size=1, sampling=greedy))
    for group in groups:
        assert group.completion_ids[0] != group.completion_ids[1]
        for made in group.completions:
            assert len(made.token_ids) == 12 or made.token_ids[-1] == EOS
            assert EOS not in made.token_ids[:-1]
            exact = plain_logprobs(model("llama"), group.prompt, made.token_ids, 1.0)
            torch.testing.assert_close(torch.tensor(made.logprobs).double(), exact, atol=2e-5, rtol=0)


def test_more_trials_are_likelier():
    with torch.no_grad():
        plain = engine("llama").generate(PROMPTS, step=0, group_size=8, sampling=SamplingConfig(max_new_tokens=12))
        chosen = careful().generate(PROMPTS, step=0, group_size=8)
    means = [
        sum(sum(one.logprobs) / len(one.token_ids) for group in groups for one in group.completions)
        for groups in (plain, chosen)
    ]
    assert means[1] > means[0]


def test_where_it_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluation.cautious=true with temperature=0: all trials are the same"):
        cli.compose(["evaluation.cautious=true"])
    with pytest.raises(ConfigError, match=r"evaluation.cautious_marks: a mark is empty"):
        cli.compose(["evaluation.cautious_marks=[]"])
    with pytest.raises(ConfigError, match=r"evaluation.cautious=true: is of rltrain evaluate alone"):
        trainer.fit(tiny_config(tmp_path / "run", "evaluation.cautious=true", "evaluation.temperature=1.0"))
    with pytest.raises(ConfigError, match=r"reads entropies of a local policy"):
        CautiousRollout(object(), None, SamplingConfig(), marks=["."], seed=0)
