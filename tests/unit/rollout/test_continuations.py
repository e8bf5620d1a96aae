"""Continuations of the local engine: against plain forwards, against the completions themselves, and counted."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from local_engine import ALPHABET, EOS, PROMPTS, engine, model, plain_logprobs, prompts

from rltrain.config import SamplingConfig
from rltrain.errors import RunError
from rltrain.rollout.continuation_types import ContinuationRequest, ContinuationSampling
from rltrain.rollout.continuations import Leaf, leaves, passes


def encode(text):
    return tuple(ALPHABET.index(character) + 3 for character in text)


def request(prompt=PROMPTS[0], prefix="", *, sample=0, draws=2, most=8, **fields):
    return ContinuationRequest(
        problem_id=prompt.problem.id,
        sample_index=sample,
        prompt_ids=prompt.token_ids,
        completion_ids=encode(prefix) if isinstance(prefix, str) else prefix,
        draws=draws,
        max_new_tokens=most,
        **fields,
    )


@contextmanager
def prefilled_tokens(network):
    """Counts the tokens of every forward of more than one token a row."""
    counted = []

    def count(module, args):
        if args[0].ndim == 2 and args[0].shape[1] > 1:
            counted.append(args[0].numel())

    handle = network.get_input_embeddings().register_forward_pre_hook(count)
    yield counted
    handle.remove()


MIXED = [
    request(PROMPTS[0], "1 + 2", draws=3),
    request(PROMPTS[0], "", draws=1, most=5),
    request(PROMPTS[0], "1 + 2", sample=1),
    request(PROMPTS[2], "a b c = 7", draws=3, most=1),
    request(PROMPTS[2], "a b", draws=3, sample=4, occurrence=1),
    request(PROMPTS[0], "1 + 3 + 4", draws=3),
]


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma2", "gpt2", "bloom", "mamba"])
def test_logprobs_are_those_of_a_plain_forward(name):
    by_id = {prompt.problem.id: prompt for prompt in PROMPTS}
    continued = engine(name, max_rows=4, check_steps=2).continue_(MIXED, step=3)
    for asked, completions in zip(MIXED, continued, strict=True):
        assert len(completions) == asked.draws
        prompt = replace(by_id[asked.problem_id], token_ids=asked.prefix_ids)
        for completion in completions:
            expected = plain_logprobs(model(name), prompt, completion.token_ids, 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, atol=1e-5, rtol=0)
            ended = completion.token_ids[-1] == EOS
            assert completion.finish == ("stop" if ended else "length")
            assert ended or len(completion.token_ids) == asked.max_new_tokens


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mamba"])
def test_a_draw_depends_on_its_request_alone(name):
    whole = engine(name).continue_(MIXED, step=3)
    alone = [engine(name, max_rows=1).continue_([asked], step=3)[0] for asked in MIXED]
    assert [[new.token_ids for new in some] for some in alone] == [[new.token_ids for new in some] for some in whole]
    fewer = engine(name, prefix_tokens_per_pass=1).continue_([replace(asked, draws=1) for asked in MIXED], step=3)
    assert [some[0].token_ids for some in fewer] == [some[0].token_ids for some in whole]
    # The same state asked by another sample, or at another step, has other draws.
    assert whole[0][0].token_ids != whole[2][0].token_ids
    assert engine(name).continue_(MIXED, step=4)[0] != whole[0]


def test_greedy_continuations_are_the_rest_of_the_greedy_completion():
    greedy = SamplingConfig(max_new_tokens=20, temperature=0.0)
    groups = engine("gemma2").generate(PROMPTS, step=0, group_size=1, sampling=greedy)
    asked, rest = [], []
    for group in groups:
        ids = group.completion_ids[0]
        for cut in range(0, len(ids), 5):
            sampling = ContinuationSampling(temperature=0.0)
            asked.append(request(group.prompt, ids[:cut], draws=1, most=20 - cut, sampling=sampling))
            rest.append(ids[cut:])
    continued = engine("gemma2").continue_(asked, step=1)
    assert [some[0].token_ids for some in continued] == rest
    assert len(rest) > 10


def test_each_prefix_is_prefilled_once_whatever_the_number_of_draws():
    """2 completions of 20 steps of 4 tokens, prompt of 5 tokens: 2 rows of 5 + 80 tokens, for any K."""
    text = "1 + 2 = 3.\n" * 8
    samples = [text[:80], ("9" + text)[:80]]
    asked = [
        request(PROMPTS[0], text[:cut], sample=i, draws=draws, most=4)
        for i, text in enumerate(samples)
        for cut in range(4, 81, 4)
        for draws in (1, 9)
    ]
    local = engine("qwen3", max_rows=64)
    local._sampling.max_new_tokens = 84
    with prefilled_tokens(model("qwen3")) as counted:
        local.continue_(asked, step=0)
    assert sum(counted) == 2 * (5 + 80)
    anew = sum(5 + cut for cut in range(4, 81, 4))  # of one completion, each state asked by itself: 20·5 + 840
    assert anew / (5 + 80) > 11
    with prefilled_tokens(model("qwen3")) as counted:
        for one in asked[:40:2]:
            local.continue_([one], step=0)
    assert sum(counted) == anew


def test_equal_prefixes_of_different_completions_are_one_state():
    shared = [request(PROMPTS[1], "12", sample=i, draws=2) for i in range(3)]
    with prefilled_tokens(model("qwen3")) as counted:
        continued = engine("qwen3").continue_(shared, step=0)
    assert sum(counted) == 1 + 2
    assert len({new.token_ids for some in continued for new in some}) > 1


def test_every_state_is_a_piece_of_the_longest_prefix_that_begins_with_it():
    found = leaves([(1, 2), (1,), (1, 2, 3), (2, 1), (1, 3), (1, 2)])
    assert found == [
        Leaf(ids=(2, 1), lengths=(2,)),
        Leaf(ids=(1, 3), lengths=(2,)),
        Leaf(ids=(1, 2, 3), lengths=(1, 2, 3)),
    ]
    assert [len(batch) for batch in passes(found, tokens_per_pass=4)] == [2, 1]
    assert [len(batch) for batch in passes(found, tokens_per_pass=9)] == [3]
    assert leaves([]) == []


def test_a_stop_string_may_begin_in_the_prefix():
    """Whatever the model says first after '=' completes '=x' for x the greedy token."""
    greedy = ContinuationSampling(temperature=0.0)
    asked = [request(PROMPTS[0], "5 =", draws=1, most=6, sampling=greedy)]
    free = engine("qwen3").continue_(asked, step=0)[0][0]
    assert len(free.token_ids) > 1
    local = engine("qwen3")
    local._sampling.stop = ["=" + free.text[0]]
    stopped = local.continue_(asked, step=0)[0][0]
    assert (stopped.token_ids, stopped.finish) == (free.token_ids[:1], "stop")


def test_no_request_gives_nothing():
    assert engine("qwen3").continue_([], step=0) == []


REFUSED = {
    "continuation of problem a, sample 0: a prefix of 3 tokens and max_new_tokens=1047 exceed "
    "sampling.max_prompt_tokens": request(PROMPTS[1], "ab", most=1047),
    "continuation of problem a, sample 2: its 3 ids hold a stop id; ask for states before": request(
        PROMPTS[1], (5, EOS, 6), sample=2
    ),
}


@pytest.mark.parametrize("message", REFUSED, ids=["too long", "behind the end"])
def test_a_request_that_cannot_be_answered_is_refused(message):
    with pytest.raises(RunError) as caught:
        engine("qwen3").continue_([REFUSED[message]], step=0)
    assert str(caught.value).startswith(message)


def test_a_request_without_a_draw_or_a_prompt_is_refused():
    with pytest.raises(ValueError, match="problem a: draws=0 and max_new_tokens=8 must be >= 1"):
        request(PROMPTS[1], draws=0)
    with pytest.raises(ValueError, match="its prompt has no tokens"):
        request(prompts("")[0])
    with pytest.raises(ValueError, match="top_p <= 1"):
        ContinuationSampling(temperature=1.0, top_p=1.5)
