"""Gradient checkpointing and LoRA bring no dropout but LoRA's own."""

import peft
import pytest
import torch
import transformers

from rltrain.errors import ConfigError
from rltrain.policy.training_mode import only_lora_dropout, recompute_layers

SMALL = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
CONFIGS = {
    # Dropout as modules, in the attention function, in the layer's own forward, and by the config.
    "gpt2": lambda: transformers.GPT2Config(vocab_size=40, n_layer=2, n_head=2, n_embd=16, attn_pdrop=0.5),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]],
        attention_dropout=0.5, resid_dropout=0.5, embed_dropout=0.5,
    ),
    "opt": lambda: transformers.OPTConfig(**SMALL, ffn_dim=16, word_embed_proj_dim=16, dropout=0.5, layerdrop=0.5),
    "phi": lambda: transformers.PhiConfig(**SMALL, intermediate_size=16, resid_pdrop=0.5, attention_dropout=0.5),
    "qwen3": lambda: transformers.Qwen3Config(
        **SMALL, intermediate_size=16, num_key_value_heads=2, head_dim=8, attention_dropout=0.5
    ),
}  # fmt: skip
IDS = torch.tensor([[3, 5, 7, 11, 13, 17]])


def model_of(name):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).train()


def gradients(model):
    model.zero_grad()
    model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)[..., 3].sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_recomputed_layers_have_no_dropout_and_the_gradients_of_evaluation(name):
    model = model_of(name)
    noisy = [model(input_ids=IDS).logits for _ in range(2)]
    assert not torch.equal(*noisy)  # training mode would
    expected_logits = model.eval()(input_ids=IDS, use_cache=False).logits
    expected = gradients(model)

    only_lora_dropout(model)
    recompute_layers(model)
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected_logits)
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[weight], expected[weight]) for weight in expected)


def test_recomputed_layers_run_twice():
    model = model_of("gpt2")
    only_lora_dropout(model)
    recompute_layers(model)
    calls = []
    model.transformer.h[0].attn.register_forward_hook(lambda *_: calls.append(1))
    gradients(model)
    assert len(calls) == 2


def test_loras_own_dropout_stays():
    model = model_of("gpt2")
    lora = peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["c_attn"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    only_lora_dropout(adapted)
    recompute_layers(adapted)
    training = {name for name, module in adapted.named_modules() if module.training}
    layers = {name for name, module in adapted.named_modules() if type(module).__name__ == "GPT2Block"}
    assert training - layers == {name for name, _ in adapted.named_modules() if "lora_dropout" in name}
    assert len(layers & training) == 2
    assert not torch.equal(*(adapted(input_ids=IDS).logits for _ in range(2)))


def test_a_model_without_layers_to_recompute_is_refused():
    with pytest.raises(ConfigError, match=r"model.gradient_checkpointing=true: Linear .*; set .*=false"):
        recompute_layers(torch.nn.Linear(2, 2))
