"""The lean decoding step: products by blocks of weight rows and fused norms against the modules they replace."""

import pytest
import torch
import transformers
from torch import nn

from rltrain.rollout.llama_step import LlamaStep, _blocks, _rms_norm, linear_map
from rltrain.rollout.shared_prompt_decoder import SharedDecoder


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("rows", "threads", "blocks"),
    [
        (49152, 1, 24),
        (49152, 2, 24),
        (49152, 7, 1),  # not divisible
        (151936, 2, 128),  # 2^7 · 1187
        (576, 1, 1),
        (576, 2, 2),
        (576, 16, 1),  # 36 rows would be too few
        (50257, 2, 1),
    ],
)
def test_every_thread_gets_as_many_blocks_of_at_most_2048_rows(rows, threads, blocks):
    assert _blocks(rows, threads) == blocks


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [10240, 4096, 256, 255])
def test_a_product_by_blocks_is_the_linear_layer(threads, rows, bias):
    torch.manual_seed(0)
    layer = nn.Linear(512, rows, bias=bias)
    x = torch.randn(5, 512)
    with torch.no_grad():
        exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        kept = linear_map(layer, keep=True)
        for apply in (linear_map(layer), kept, kept):
            torch.testing.assert_close(apply(x).double(), exact, atol=1e-5, rtol=0)
        torch.testing.assert_close(kept(x[:2]).double(), exact[:2], atol=1e-5, rtol=0)


def test_weights_are_read_where_they_lie_and_hooks_are_kept():
    layer = nn.Linear(512, 4096, bias=False)
    apply = linear_map(layer)
    x = torch.randn(3, 512)
    with torch.no_grad():
        before = apply(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(apply(x), 2 * before)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    assert linear_map(layer) is layer


def test_one_norm_of_many_heads_is_each_head_s_own():
    torch.manual_seed(0)
    x, weight = torch.randn(6, 3, 8), torch.randn(3, 8)
    norm = _rms_norm(weight, 1e-3)
    for head in range(3):
        expected = torch.rms_norm(x[:, head], (8,), weight[head], 1e-3)
        torch.testing.assert_close(norm(x)[:, head], expected, atol=2e-6, rtol=1e-6)
        cast = _rms_norm(weight.bfloat16(), 1e-3)(x.bfloat16())[:, head]
        torch.testing.assert_close(cast.float(), expected, atol=0.03, rtol=0.02)
    assert torch.equal(norm(torch.zeros(1, 3, 8)), torch.zeros(1, 3, 8))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_step_by_blocks_is_the_model_itself(threads, kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 4096}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[kind](**sizes, **heads, head_dim=64)
    network = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        decoders = [SharedDecoder(network, pad_id=0, max_new_tokens=64) for _ in range(2)]
        assert isinstance(decoders[0]._forward, LlamaStep)
        decoders[1]._forward = decoders[1]._transformers_forward
        for decoder in decoders:
            decoder.admit([(5, 6, 7), (8, 9)], 3)
        for step in range(3):
            lean, full = [decoder.step(torch.arange(6) * 7 + step) for decoder in decoders]
            torch.testing.assert_close(lean, full, atol=2e-4, rtol=0)
        for decoder in decoders:
            decoder.keep([0, 1, 4])
        lean, full = (decoder.step(torch.tensor([1, 2, 3])) for decoder in decoders)
        torch.testing.assert_close(lean, full, atol=2e-4, rtol=0)
