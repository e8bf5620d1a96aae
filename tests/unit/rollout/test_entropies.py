"""The service ``context.entropy``: the two numbers by hand, and the service against a plain forward."""

import json
import math

import pytest
import torch
from local_engine import PROMPTS, engine, ids, model

from rltrain.config import SamplingConfig
from rltrain.errors import RunError
from rltrain.policy.load import load_policy
from rltrain.policy.logprobs import LogprobModel
from rltrain.policy.tiny import TinyConfig
from rltrain.rollout.entropies import SampledEntropies
from rltrain.rollout.sampling import distribution, entropy_and_collision
from rltrain.runs import completions
from rltrain.types import Completion, Context, Group, Problem, Prompt

SMALL = TinyConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64)


def test_by_hand():
    """(1/2, 1/4, 1/4): H = ½ ln 2 + ½ ln 4 = 1.5 ln 2, Σ p² = ¼ + 2/16 = 3/8. A point mass: 0 and 1."""
    pair_B2 = entropy_and_collision(torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]], dtype=torch.float64))
    expected = torch.tensor([[1.5 * math.log(2), 3 / 8], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(pair_B2, expected)


def group(prompt_ids, completion_ids):
    completions = tuple(Completion(token_ids=ids, logprobs=(0.0,) * len(ids), finish="stop") for ids in completion_ids)
    return Group(
        prompt=Prompt(problem=Problem(id="p", prompt="", answer=""), token_ids=prompt_ids), completions=completions
    )


GROUPS = [group((5, 9), [(12, 40, 41, 7), (3,)]), group((8,), [(30, 2), tuple(range(6, 26))])]


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("sampling", [SamplingConfig(temperature=0.7), SamplingConfig(top_k=5, top_p=0.6)])
def test_the_scoring_pass_reads_the_sampling_distribution(sampling, own_head):
    policy = load_policy(SMALL)
    model = LogprobModel(policy.model, temperature=sampling.temperature)
    model.own_head = own_head
    scored = SampledEntropies(model, sampling, token_budget=24)(GROUPS)
    for one, pairs in zip(GROUPS, scored, strict=True):
        for completion, pair in zip(one.completions, pairs, strict=True):
            ids, start = one.prompt.token_ids + completion.token_ids, len(one.prompt.token_ids)
            with torch.no_grad():
                logits_TV = policy.model(torch.tensor([ids])).logits[0, start - 1 : -1]
            settings = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
            expected_T2 = entropy_and_collision(distribution(logits_TV, **settings))
            torch.testing.assert_close(pair.entropy_T, expected_T2[:, 0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(pair.collision_T, expected_T2[:, 1], rtol=1e-4, atol=1e-6)


def test_undeclared_it_is_refused():
    with pytest.raises(RunError) as caught:
        Context().entropy(GROUPS)
    assert str(caught.value) == (
        "context.entropy: nothing declared this service; register the part with needs={Need.ENTROPY}, "
        "or give a function of yours needs = {Need.ENTROPY}"
    )


@pytest.mark.parametrize("settings", [{}, {"max_rows": 4}, {"speculate_tokens": 3}, {"compact_share": 1.0}])
def test_the_local_sampler_keeps_what_a_plain_forward_gives(settings):
    """With every way of batching; tokens and log-probs are those of an engine that keeps nothing."""
    sampling = SamplingConfig(max_new_tokens=24, temperature=0.8, top_k=9, top_p=0.9)
    plain, keeping = engine(**settings), engine(**settings)
    keeping.keeps_entropies = True
    groups = keeping.generate(PROMPTS, step=0, group_size=3, sampling=sampling)
    assert ids(groups) == ids(plain.generate(PROMPTS, step=0, group_size=3, sampling=sampling))
    network = model("qwen3").eval()
    for sampled in groups:
        for completion in sampled.completions:
            start = len(sampled.prompt.token_ids)
            with torch.no_grad():
                logits_TV = network(torch.tensor([sampled.prompt.token_ids + completion.token_ids])).logits[0]
            expected = distribution(logits_TV[start - 1 : -1], temperature=0.8, top_k=9, top_p=0.9)
            kept = torch.tensor(completion.entropies)
            torch.testing.assert_close(kept, entropy_and_collision(expected), rtol=1e-3, atol=1e-4)


def test_what_the_sampler_kept_is_not_scored_again():
    """No model is there to score with. Without entropies the same completions need one."""
    sampler = engine()
    sampler.keeps_entropies = True
    groups = sampler.generate(PROMPTS[:2], step=0, group_size=2)
    service = SampledEntropies(None, SamplingConfig(), token_budget=64)
    for sampled, pairs in zip(groups, service(groups), strict=True):
        for completion, pair in zip(sampled.completions, pairs, strict=True):
            assert list(zip(pair.entropy_T.tolist(), pair.collision_T.tolist(), strict=True)) == list(
                completion.entropies
            )
    with pytest.raises(AttributeError):
        service(engine().generate(PROMPTS[:1], step=0, group_size=2))


def test_a_batch_sampled_ahead_is_saved_with_its_entropies():
    sampler = engine()
    sampler.keeps_entropies = True
    flat = [one for sampled in sampler.generate(PROMPTS[:2], step=0, group_size=2) for one in sampled.completions]
    facts = json.loads(json.dumps([completions.facts_of(one) for one in flat]))
    tensors = completions.flat_ids(flat, torch.int32), completions.flat_logprobs(flat, torch.float64)
    assert completions.restored(facts, *tensors) == flat
