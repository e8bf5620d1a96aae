"""The check of the local decoders: each kind passes where it is right, and the next takes over where it is not."""

import types

import peft
import pytest
import torch
from local_engine import PROMPTS, Policy, engine, ids, model, plain_logprobs, tokenizer

from rltrain.config import SamplingConfig
from rltrain.errors import ConfigError
from rltrain.policy.model_check import check_units, own_logprobs, quiet
from rltrain.rollout.decoder_check import check_decoders, decoder_logprobs
from rltrain.rollout.local import LocalRollout, LocalRolloutConfig, decoder_kinds

FASTEST = {
    "qwen3": "the decoder for Llama-shaped models",
    "llama": "the decoder for Llama-shaped models",
    "gemma2": "the decoder that shares prompts",
    "gpt2": "the decoder that shares prompts",
    "bloom": "the decoder with its own cache",
    "gpt_oss": "the decoder with its own cache",
    "mamba": "the decoder with its own cache",
}


def networks(name):
    """A model of its own, so that a test may break it."""
    kept = model(name)
    copy = type(kept)(kept.config)
    copy.load_state_dict(kept.state_dict())
    return copy.eval()


@pytest.mark.parametrize("name", FASTEST)
def test_every_decoder_is_right_and_the_fastest_is_taken(name, caplog):
    network = networks(name)
    kinds, units = decoder_kinds(network, pad_id=0), check_units(network)
    with quiet(network):
        own_N = own_logprobs(network, units)
        for kind in kinds:
            decoder = kind.make(9)
            found = decoder_logprobs(decoder, units)
            torch.testing.assert_close(found, own_N.repeat(1 + decoder.refills), atol=2e-6, rtol=0)
    assert check_decoders(network, kinds)[0].name == FASTEST[name]
    assert not [record for record in caplog.records if record.name.startswith("rltrain")]


def test_a_decoder_that_cannot_be_made_gives_way_to_the_next(caplog):
    def fails(_):
        raise AttributeError("no such layer")

    network = networks("llama")
    first, *others = decoder_kinds(network, pad_id=0)
    assert check_decoders(network, [first._replace(make=fails), *others]) == others
    assert "AttributeError: no such layer" in caplog.text


def test_a_cache_that_is_wrong_gives_way_to_none(caplog):
    """Logits of a single fed token are scaled: cached steps are wrong, whole forwards are right."""
    network = networks("llama")
    forward = type(network).forward

    def cached_wrongly(self, *args, past_key_values=None, **kwargs):
        output = forward(self, *args, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None and kwargs["input_ids"].shape[1] == 1:
            output.logits = 1.5 * output.logits
        return output

    network.forward = types.MethodType(cached_wrongly, network)
    network.lm_head.register_forward_hook(lambda _, args, out: out * (1.5 if args[0].ndim == 2 else 1))
    rollout = LocalRollout(
        LocalRolloutConfig(), SamplingConfig(max_new_tokens=12), Policy(network, tokenizer()), seed=7
    )
    rollout.check()
    assert [record.message.count("is used") for record in caplog.records] == [1, 1, 1]
    assert "by the decoder for Llama-shaped models are" in caplog.text
    assert "the decoder without a cache is used; it is slow" in caplog.text
    for group in rollout.generate(PROMPTS, step=3, group_size=2):
        for completion in group.completions:
            expected = plain_logprobs(network, group.prompt, completion.token_ids, 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, atol=1e-5, rtol=0)


def test_no_decoder_is_an_error():
    network = networks("llama")
    kinds = decoder_kinds(network, pad_id=0)
    network.model.embed_tokens.register_forward_hook(lambda _, args, out: out * (2 if len(args[0]) > 1 else 1))
    with pytest.raises(ConfigError, match=r"rollout: log-probs of LlamaForCausalLM by the decoder without a cache are"):
        check_decoders(network, kinds)


def test_the_check_sees_adapters_that_are_new():
    """A head's adapters are zero at first: only perturbed ones show a decoder that leaves them out."""
    network = networks("llama")
    adapted = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    kinds = decoder_kinds(adapted.get_base_model(), pad_id=0)
    assert len(check_decoders(adapted.get_base_model(), kinds)) == 4
    blind = kinds[0].make(9)
    blind._forward._head = adapted.get_base_model().lm_head.base_layer
    kinds[0] = kinds[0]._replace(make=lambda _: blind)
    assert len(check_decoders(adapted.get_base_model(), kinds)) == 3


def test_the_decoder_without_a_cache_samples_what_the_fast_one_does():
    fast, slow = engine("qwen3"), engine("qwen3", max_rows=4)
    slow._kinds = slow._kinds[-1:]
    drawn = ids(fast.generate(PROMPTS, step=5, group_size=3))
    assert ids(slow.generate(PROMPTS, step=5, group_size=3)) == drawn
