"""The check before the first step: what it finds, what it falls back to, and that it leaves nothing behind."""

import types

import peft
import pytest
import torch
import transformers

from rltrain.batching.collate import NO_WEIGHTING, token_batch
from rltrain.errors import ConfigError
from rltrain.policy.layout_check import differences, usable_layouts
from rltrain.policy.logprobs import LogprobModel
from rltrain.policy.model_check import check_units, own_logprobs, perturbed, quiet

SMALL = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
MULTIPLIED = {
    "cohere": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.3),
    "granite": lambda: transformers.GraniteConfig(
        **SMALL, logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.1
    ),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5),
    "falcon_h1": lambda: transformers.FalconH1Config(
        **SMALL, lm_head_multiplier=0.1, embedding_multiplier=3.0, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8,
        mamba_d_state=4, mamba_chunk_size=8,
    ),
    "mpt": lambda: transformers.MptConfig(vocab_size=60, d_model=16, n_heads=2, n_layers=2, logit_scale=None),
    "phi": lambda: transformers.PhiConfig(**SMALL),  # a bias on the head
}  # fmt: skip


def network(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def llama(**settings):
    return network(transformers.LlamaConfig(**SMALL, **settings))


def wrapped(model):
    return LogprobModel(model, temperature=0.7)


@pytest.mark.parametrize("name", MULTIPLIED)
def test_multipliers_caps_and_biases_of_known_architectures_go_by_the_heads_weights(name):
    model = wrapped(network(MULTIPLIED[name]()))
    layouts = usable_layouts("auto", [model])
    assert not model.own_head
    assert all(apart.nats < 2e-6 for apart in differences(model, layouts).values())


def test_a_multiplier_that_nobody_knows_makes_the_model_use_its_own_head(caplog):
    network = llama()
    network.forward = types.MethodType(scaled(type(network).forward, 3.0), network)
    model = wrapped(network)
    assert usable_layouts("auto", [model]) == ("padded", "packed", "shared")
    assert model.own_head
    assert "log-probs of LlamaForCausalLM by the weights of its head are" in caplog.text
    assert all(apart.nats < 2e-6 for apart in differences(model, ["padded", "packed", "shared"]).values())


def scaled(forward, factor):
    def call(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = factor * output.logits
        return output

    return call


def test_a_wrong_multiplier_is_refused_where_the_own_head_does_not_help():
    """The first call of a batch of several rows is wrong: no head can mend that."""
    network = llama()
    network.model.embed_tokens.register_forward_hook(lambda _, args, out: out * (2 if args[0].shape[0] > 1 else 1))
    with pytest.raises(ConfigError, match=r"the trainer's log-probs of LlamaForCausalLM are .* nats .*choose another"):
        usable_layouts("padded", [wrapped(network)])


@pytest.mark.parametrize("tied", [False, True])
def test_lora_on_the_head_is_in_log_probs_and_learns(tied):
    base = llama()
    if tied:
        base.config.tie_word_embeddings = True
        base.tie_weights()
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    model = wrapped(adapted)
    assert model.own_head and usable_layouts("auto", [model]) == ("padded", "packed", "shared")
    assert all(apart.nats < 2e-6 for apart in differences(model, ["padded", "packed", "shared"]).values())
    units = check_units(adapted)
    model(token_batch(units, NO_WEIGHTING, "shared"))[0].sum().backward()
    grad = adapted.base_model.model.lm_head.lora_B["default"].weight.grad
    assert grad.abs().max() > 1e-3
    model.own_head = False  # the base weights alone, as before: only perturbed adapters tell
    assert differences(model, ["padded"])["padded"].nats > 0.01


def test_the_check_leaves_weights_flags_and_generators_as_they_were():
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"]))
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    training = {name for name, module in adapted.named_modules() if module.training}
    state = torch.get_rng_state()
    usable_layouts("auto", [wrapped(adapted)])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, before[name]) for name, weight in adapted.state_dict().items())
    assert {name for name, module in adapted.named_modules() if module.training} == training


def test_adapters_are_perturbed_and_put_back_bit_for_bit():
    adapters = [torch.randn(3, 4), torch.zeros(4, 3, dtype=torch.bfloat16)]
    before = [weight.clone() for weight in adapters]
    with perturbed(adapters):
        moved = [float((weight - kept).float().std()) for weight, kept in zip(adapters, before, strict=True)]
        assert all(0.02 < size < 0.1 for size in moved)
    assert all(torch.equal(weight, kept) for weight, kept in zip(adapters, before, strict=True))


def test_own_log_probs_are_those_of_row_by_row_forwards():
    model = llama()
    units = check_units(model)
    assert [len(unit[0].prompt_ids) for unit in units] == [5, 11]
    assert [len(row.completion_ids) for unit in units for row in unit] == [3, 6] * 2
    assert all(0 < token < 60 for unit in units for row in unit for token in row.prompt_ids + row.completion_ids)
    with quiet(model):
        found = own_logprobs(model, units)
        row = units[0][1]
        logits = model(input_ids=torch.tensor([row.prompt_ids + row.completion_ids])).logits[0]
    expected = [logits[4 + t].log_softmax(-1)[token] for t, token in enumerate(row.completion_ids)]
    torch.testing.assert_close(found[3:9], torch.stack(expected))


def test_a_model_that_sees_later_tokens_is_refused():
    bert = network(transformers.BertConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}))
    with pytest.raises(ConfigError, match="in BertLMHeadModel .* tokens see later ones"):
        usable_layouts("padded", [wrapped(bert)])


def test_logits_that_are_not_finite_are_refused():
    broken = llama()
    broken.lm_head.weight.data[5] = torch.nan
    with pytest.raises(ConfigError, match="the logits of LlamaForCausalLM are not finite"):
        usable_layouts("padded", [wrapped(broken)])


def test_bfloat16_has_its_own_limit():
    model = wrapped(llama().to(torch.bfloat16))
    apart = differences(model, ["padded", "packed", "shared"])
    assert all(each.fits and 1e-4 < each.limit < 0.09 for each in apart.values())


def test_tokens_that_a_config_gives_a_part_of_their_own_are_left_out():
    """Several ids may end a text (GLM); others stand for images."""
    model = llama()
    model.config.eos_token_id, model.config.image_token_id = [7, 11, 48], 12
    used = {token for unit in check_units(model) for row in unit for token in row.prompt_ids + row.completion_ids}
    assert used and not used & {0, 7, 11, 12, 48}
