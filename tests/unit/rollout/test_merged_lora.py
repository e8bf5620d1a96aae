"""LoRA merged for a rollout: the logits of the unmerged model, which keeps its weights bit for bit."""

import copy
import math

import peft
import pytest
import torch
from local_engine import PROMPTS, Policy, model, plain_logprobs, tokenizer
from peft.tuners import lora

from rltrain.config import SamplingConfig
from rltrain.rollout.local import LocalRollout, LocalRolloutConfig
from rltrain.rollout.merged_lora import merged_lora
from rltrain.rollout.shared_prompt_decoder import SharedDecoder

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(name="qwen3", **options):
    torch.manual_seed(1)
    network = peft.get_peft_model(copy.deepcopy(model(name)), peft.LoraConfig(**{"target_modules": ALL} | options))
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.3)
    return network.eval()


def step_logits(network, *, fused):
    """Of a prefill and three decoding steps, and the calls of LoRA layers that each decoding step made."""
    calls, forward = [], lora.Linear.forward
    lora.Linear.forward = lambda self, *args, **kwargs: (calls.append(1), forward(self, *args, **kwargs))[1]
    try:
        with torch.no_grad():
            decoder = SharedDecoder(network.get_base_model(), pad_id=0, max_new_tokens=8, fused=fused)
            logits = [decoder.admit([(5, 6, 7), (8, 9)], 2)]
            calls.clear()
            logits += [decoder.step(torch.tensor([3, 4, 5, 6]) + step).clone() for step in range(3)]
    finally:
        lora.Linear.forward = forward
    return torch.stack(logits), len(calls) // 3


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ALL},
        {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "lm_head"], "lora_dropout": 0.5},
        {"r": 4, "lora_alpha": 6, "target_modules": ["k_proj", "down_proj"], "use_rslora": True},
        {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 3}, "target_modules": ALL},
    ],
    ids=["all", "head", "rslora", "patterns"],
)
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_merged_logits_are_those_of_the_adapters(name, options):
    network = adapted(name, **options)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    merged, merged_calls = step_logits(network, fused=True)
    expected, calls = step_logits(network, fused=False)
    torch.testing.assert_close(merged, expected, atol=2e-5, rtol=1e-5)
    assert merged_calls == 0 and calls == sum(isinstance(each, lora.Linear) for each in network.modules())
    with network.disable_adapter():
        assert (step_logits(network, fused=False)[0] - expected).abs().max() > 0.01
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_the_sum_is_in_fp32_and_rounded_once():
    layers = [each for each in adapted(r=4, lora_alpha=6, use_rslora=True).modules() if isinstance(each, lora.Linear)]
    layer = copy.deepcopy(layers[0])
    layer.base_layer.bfloat16()
    low, high = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = layer.base_layer.weight.double() + 6 / math.sqrt(4) * high @ low
    weight, bias = merged_lora(layer)
    torch.testing.assert_close(weight.double(), exact, atol=0, rtol=2**-8)
    assert weight.dtype == torch.bfloat16 and bias is layer.base_layer.bias


def test_two_active_adapters_are_both_added():
    network = adapted(r=2, target_modules=["q_proj"])
    network.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    network.base_model.set_adapter(["default", "second"])
    assert step_logits(network, fused=True)[1] == 0
    torch.testing.assert_close(
        step_logits(network, fused=True)[0], step_logits(network, fused=False)[0], atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["dora", "hook", "off", "merged"])
def test_what_is_more_than_the_formula_is_called(kind):
    network = adapted(r=2, target_modules=["q_proj", "down_proj"], use_dora=kind == "dora")
    layers = [each for each in network.modules() if isinstance(each, lora.Linear)]
    if kind == "hook":
        for layer in layers:
            layer.lora_B["default"].register_forward_hook(lambda module, args, output: 2 * output)
    if kind == "off":
        network.base_model.disable_adapter_layers()
    if kind == "merged":
        network.merge_adapter()
    assert [merged_lora(layer) for layer in layers] == [None] * len(layers)
    called, calls = step_logits(network, fused=True)
    torch.testing.assert_close(called, step_logits(network, fused=False)[0], atol=2e-5, rtol=1e-5)
    assert calls == len(layers)


def test_a_rollout_uses_the_adapters_of_the_moment():
    network = adapted(r=4, target_modules=ALL, lora_dropout=0.5).train()
    sampling = SamplingConfig(max_new_tokens=8)
    rollout = LocalRollout(LocalRolloutConfig(), sampling, Policy(network, tokenizer()), seed=7)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.5)
    seen = []
    for step in range(2):
        groups = rollout.generate(PROMPTS, step=5, group_size=2)
        seen.append([completion.logprobs for group in groups for completion in group.completions])
        for group in groups:
            for completion in group.completions:
                expected = plain_logprobs(network, group.prompt, completion.token_ids, 1.0)
                torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, atol=1e-5, rtol=0)
        if step == 0:
            network(input_ids=torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6, 7, 8]])).loss.backward()
            optimizer.step()
    assert rollout.same_distribution and seen[0] != seen[1]
