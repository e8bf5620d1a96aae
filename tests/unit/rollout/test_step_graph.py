"""A decoding step can be captured: the host reads nothing in it, and fixed addresses give the right logits."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from local_engine import PAD, PROMPTS, SHARED, VOCABULARY, model
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rltrain.errors import ConfigError
from rltrain.rollout.llama_step import LlamaStep, stacked_map
from rltrain.rollout.local import LocalRolloutConfig
from rltrain.rollout.shared_prompt_decoder import SharedDecoder, grown

READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cuda"}
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "lift_fresh", "equal")


class NoHost(TorchFunctionMode):
    """Fails where Python reads a tensor or makes one of its own numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        moves = name == "to" and any(isinstance(argument, (str, torch.device)) for argument in args)
        assert name not in READS and not moves and function not in (torch.tensor, torch.as_tensor), name
        return function(*args, **(kwargs or {}))


class NoSync(TorchDispatchMode):
    """Fails at operations whose result the host must wait for, or that copy between devices."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(name in str(function) for name in SYNCHRONISING), function
        assert "device" not in (kwargs or {}) or function.overloadpacket is not torch.ops.aten._to_copy, function
        return function(*args, **(kwargs or {}))


def windowed():
    """Qwen3 with a window of five tokens in its second layer."""
    torch.manual_seed(0)
    window = {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]}
    config = transformers.Qwen3Config(**SHARED, **VOCABULARY, **window, num_key_value_heads=2, head_dim=8)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


NETWORKS = {
    "llama": lambda: copy.deepcopy(model("llama")).eval(),
    "qwen3": lambda: copy.deepcopy(model("qwen3")).eval(),
    "window": windowed,
}


def decoders(name, count):
    made = [SharedDecoder(NETWORKS[name](), pad_id=PAD, max_new_tokens=64) for _ in range(count)]
    for decoder in made:
        assert isinstance(decoder._forward, LlamaStep)
        decoder.admit([prompt.token_ids for prompt in PROMPTS], 2)
    return made


def tokens_of(step):
    return (torch.arange(2 * len(PROMPTS)) * 7 + step) % VOCABULARY["vocab_size"]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_host_reads_nothing_in_a_step(name):
    """All of a step in which the cache does not grow, from tokens to logits."""
    (decoder,), tokens = decoders(name, 1), [tokens_of(step) for step in range(4)]
    with torch.no_grad():
        decoder.step(tokens[0])
        with NoHost(), NoSync():
            for step in range(1, 4):
                decoder.step(tokens[step])
    with pytest.raises(AssertionError, match="item"), NoHost():
        torch.ones(1).item()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        bool(torch.ones(1) > 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_captured_step_gives_the_logits_of_the_steps_after_it(name):
    """torch.fx records a step's operations on fixed tensors, as a CUDA graph does; Python runs no more in a replay."""
    plain, captured = decoders(name, 2)
    with torch.no_grad():
        for step in range(12):
            if step == 2:
                captured._open(1)
                recorded = make_fx(lambda tokens_B: captured._present_logits(tokens_B))(tokens_of(step))
                captured._columns -= 1
                captured._present_logits = recorded
            expected, found = plain.step(tokens_of(step)), captured.step(tokens_of(step))
            assert torch.equal(found, expected)
        assert plain.capacity == 16


def test_a_decoder_and_its_weights_go_at_once():
    """Without a collection of cycles, which may come much later than the memory is needed."""
    (decoder,) = decoders("llama", 1)
    gone = [weakref.ref(decoder), weakref.ref(decoder._forward)]
    with torch.no_grad():
        decoder.step(tokens_of(0))
    gc.disable()
    try:
        del decoder
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def test_growth_by_a_quarter_but_on_a_cpu_by_blocks():
    assert [grown(n, "cpu") for n in (0, 16, 32)] == [16, 32, 48]
    sizes = [0]
    while sizes[-1] < 8192:
        sizes.append(grown(sizes[-1], "cuda"))
    assert sizes[1:6] == [64, 80, 112, 144, 192]  # 64 + 16, + 32 (28 rounded up), + 32, + 48
    assert len(sizes) < 26 and all(size % 16 == 0 for size in sizes)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_stacked_products_are_the_modules_results_side_by_side(bias, flat):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, rows, bias=bias) for rows in (6, 4, 4)]
    if flat:  # as in the flat buffer of an optimiser: a view, which follows the weights
        buffer = torch.cat([layer.weight.detach().flatten() for layer in layers])
        for layer, part in zip(layers, buffer.split([layer.weight.numel() for layer in layers]), strict=True):
            layer.weight.data = part.view_as(layer.weight)
    x = torch.randn(3, 8)
    with torch.no_grad():
        apply = stacked_map(layers)
        if flat:
            buffer.mul_(2)
        torch.testing.assert_close(apply(x), torch.cat([layer(x) for layer in layers], -1))
    layers[1].register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(stacked_map(layers)(x), torch.cat([layer(x) for layer in layers], -1))


def test_looks_are_rarer_where_launches_are_asynchronous():
    assert LocalRolloutConfig().steps_between_looks("cpu") == 4
    assert LocalRolloutConfig().steps_between_looks("cuda") == 16
    assert LocalRolloutConfig(check_steps=7).steps_between_looks("cuda") == 7
    with pytest.raises(ConfigError, match=r"rollout.cuda_graph=on: unknown; set auto or off"):
        LocalRolloutConfig(cuda_graph="on")
