"""Probes: the branched cache against feeding every cut anew, confidence and accuracy against closed forms."""

import dataclasses

import pytest
import torch
from probe_models import TOKENIZER, policy_of, request, tiny_model

from rltrain.errors import ConfigError
from rltrain.rollout import probes, sampling
from rltrain.rollout.probe_types import ProbeSettings, vocabulary

SUFFIX = tuple(TOKENIZER("\\boxed{")["input_ids"])


REQUESTS = [
    request("a", "12+7=", "12+7=19\n19-2=17\n = 17", (8, 16), "17"),
    request("b", "3*3=?", "3*3=9\n", (6,), "9", sample_index=3),
    request("none", "5", "5 = 5", (), "5"),
    request("a", "12+7=", "12+7\n=19\n-2\n=17\n .... \n", (5, 9, 12, 16, 23), "-17.25", sample_index=1),
    dataclasses.replace(request("a", "12+7=", "12+7=19\n19-2=17\n = 17", (8, 16), "17"), occurrence=2),
]
SETTINGS = ProbeSettings(seed=7, step=2, suffix_ids=SUFFIX, continuations=3, max_tokens=6)


def closes(text):
    depth = 1
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return True
    return False


@torch.no_grad()
def refed(model, one, settings):
    """The definition, feeding the whole sequence again for every cut and every token."""
    texts, result = vocabulary(TOKENIZER), []
    name = f"{one.problem_id}/probe"
    key = torch.tensor(
        [sampling.row_key(settings.seed, settings.step, name, one.sample_index, occurrence=one.occurrence)]
    )
    for cut in one.cuts:
        stem = [*one.prompt_ids, *one.completion_ids[:cut], *settings.suffix_ids]
        forced = model(torch.tensor([[*stem, *one.answer_ids]])).logits[0].softmax(-1)
        accuracy = sum(float(forced[len(stem) - 1 + a, token]) for a, token in enumerate(one.answer_ids))
        confidences = []
        for n in range(settings.continuations):
            drawn, entropies = [], []
            for index in range(settings.max_tokens):
                logits = model(torch.tensor([[*stem, *drawn]])).logits[0, -1:]
                entropies.append(float(torch.distributions.Categorical(logits=logits).entropy()))
                position = torch.tensor([(cut * settings.continuations + n) * settings.max_tokens + index])
                drawn.append(
                    int(
                        sampling.sample(
                            logits,
                            sampling.uniforms(key, position),
                            temperature=settings.temperature,
                            top_k=0,
                            top_p=1.0,
                        )[0]
                    )
                )
                text = "".join(texts[token] for token in drawn if token < len(texts))
                if closes(text) or drawn[-1] == TOKENIZER.eos_token_id:
                    break
            confidences.append(float(torch.tensor(entropies).double().mean().neg().exp()))
        result.append((accuracy / len(one.answer_ids), sum(confidences) / settings.continuations))
    return result


@pytest.mark.parametrize(("family", "attention"), [("qwen3", "sdpa"), ("llama", "sdpa"), ("qwen3", "eager")])
def test_branches_equal_feeding_every_cut_anew(family, attention):
    model = tiny_model(family, attention)
    results = probes.probe(policy_of(model), REQUESTS, SETTINGS)
    for one, result in zip(REQUESTS, results, strict=True):
        expected = torch.tensor(refed(model, one, SETTINGS), dtype=torch.float64).reshape(-1, 2)
        torch.testing.assert_close(result.accuracy_K, expected[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(result.confidence_K, expected[:, 1], atol=1e-5, rtol=0)


def test_a_box_closes_inside_the_token_that_brings_the_depth_to_zero():
    braces = probes._Braces(("}", "{", "a}", "{x}", "}{", "b"), 8, torch.device("cpu"))
    depth_R, closed_R = braces.step(torch.tensor([1, 1, 2, 1, 1, 1, 1]), torch.tensor([0, 1, 2, 3, 4, 5, 7]))
    assert closed_R.tolist() == [True, False, False, False, True, False, False]
    assert depth_R.tolist() == [0, 2, 1, 1, 1, 1, 1]


def test_the_vocabulary_is_walked_once():
    texts = ("{", "}{once}")
    walked = probes._brace_counts.cache_info().misses
    for _ in range(3):
        probes._Braces(texts, 2, torch.device("cpu"))
    assert probes._brace_counts.cache_info().misses == walked + 1


def test_a_uniform_policy_has_accuracy_and_confidence_one_over_the_vocabulary():
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    for result in probes.probe(policy_of(model), REQUESTS, SETTINGS):
        uniform_K = torch.full_like(result.accuracy_K, 1 / model.config.vocab_size)
        torch.testing.assert_close(result.accuracy_K, uniform_K, atol=1e-8, rtol=0)
        torch.testing.assert_close(result.confidence_K, uniform_K, atol=1e-8, rtol=0)


def test_batching_order_and_other_cuts_change_nothing():
    policy = policy_of(tiny_model())
    together = probes.probe(policy, REQUESTS, SETTINGS)
    alone = probes.probe(policy, REQUESTS[::-1], dataclasses.replace(SETTINGS, tokens_per_pass=1))[::-1]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.accuracy_K, other.accuracy_K, atol=1e-6, rtol=0)
        torch.testing.assert_close(one.confidence_K, other.confidence_K, atol=1e-6, rtol=0)
    [only] = probes.probe(policy, [dataclasses.replace(REQUESTS[3], cuts=(12,))], SETTINGS)
    torch.testing.assert_close(only.confidence_K[0], together[3].confidence_K[2], atol=1e-6, rtol=0)


def test_seed_and_step_key_the_continuations_but_not_the_forced_answer():
    policy = policy_of(tiny_model())
    first, again, other = (
        probes.probe(policy, REQUESTS[:1], dataclasses.replace(SETTINGS, step=step))[0] for step in (2, 2, 3)
    )
    assert torch.equal(first.confidence_K, again.confidence_K)
    assert torch.equal(first.accuracy_K, other.accuracy_K)
    assert not torch.equal(first.confidence_K, other.confidence_K)


def test_the_policy_keeps_its_mode_and_builds_no_graph():
    model = tiny_model().train()
    results = probes.probe(policy_of(model), REQUESTS[:1], SETTINGS)
    assert model.training and not results[0].confidence_K.requires_grad


def test_branching_feeds_the_completion_once_and_each_probe_once():
    model, fed = tiny_model(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True)
    one = request("a", "12+7=", "x" * 128, tuple(range(16, 129, 16)), "17")
    probes.probe(policy_of(model), [one], SETTINGS)
    anew = sum(len(one.prompt_ids) + cut + len(SUFFIX) + len(one.answer_ids) for cut in one.cuts)
    branched = len(one.prompt_ids) + 128 + len(one.cuts) * (len(SUFFIX) + 1 + SETTINGS.continuations * 5)
    assert sum(fed) <= branched < anew


def test_unusable_models_and_requests_are_refused_with_the_remedy():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="attn_implementation=sdpa"):
        probes.probe(policy_of(model), REQUESTS, SETTINGS)
    with pytest.raises(ConfigError, match="full attention"):
        sliding = tiny_model()
        sliding.config.layer_types = ["full_attention", "sliding_attention"]
        probes.probe(policy_of(sliding), REQUESTS, SETTINGS)
    with pytest.raises(ValueError, match="problem p: its answer has no tokens"):
        request("p", "1", "2", (1,), "")
    with pytest.raises(ValueError, match="cuts"):
        request("p", "1", "2", (2,), "2")
