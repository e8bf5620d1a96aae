"""Prefix and row attended apart and merged by log-sum-exp: values and gradients of the masked softmax over both."""

import copy
from types import SimpleNamespace

import pytest
import torch
from packed_models import batches_of, tiny
from torch._subclasses.fake_tensor import FakeTensorMode

from rltrain.batching.bins import CPU, CUDA, costs_of, packed_work
from rltrain.batching.collate import work_of
from rltrain.policy import packed_attention
from rltrain.policy.layout_check import slow_attention
from rltrain.policy.logprobs import packed_inputs
from rltrain.policy.merged_attention import _Merged, merged_attention, takes_flash
from rltrain.policy.packed_attention import SegmentAttention


def drawn(heads, kv_heads, dtype, rows=3, prefix=5, tokens=4, size=8):
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(rows, heads, tokens, size, generator=draw, dtype=torch.float64)
    key, value = (torch.randn(rows, kv_heads, prefix + tokens, size, generator=draw, dtype=torch.float64) for _ in "kv")
    return [x.to(dtype).requires_grad_() for x in (query, key, value)]


def reference(query, key, value, prefix, scale):
    """softmax over keys j <= prefix + i, every step written out."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(prefix)
    scores = (query @ key.mT * scale).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ value


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_values_and_gradients_are_those_of_the_masked_softmax(heads, kv_heads, dtype, atol, scale):
    inputs = drawn(heads, kv_heads, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = merged_attention(*inputs, prefix=5, scale=scale)
    expected = reference(*exact, prefix=5, scale=scale or 8**-0.5)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = [out, *torch.autograd.grad(out, inputs, grad.to(dtype))]
    for one, other in zip(found, [expected, *torch.autograd.grad(expected, exact, grad)], strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, atol=atol, rtol=0)


@pytest.mark.parametrize(("window", "merged"), [(None, True), (64, True), (6, False)])
def test_a_packed_batch_attends_the_same_merged_or_masked(window, merged):
    """Groups of unequal prompts and completions; a window that cuts the prefix keeps its mask."""
    (batch,) = batches_of("shared")
    draw = torch.Generator().manual_seed(0)
    shape = (len(batch.input_ids_L), 8)
    inputs = [torch.randn(h, *shape, generator=draw, dtype=torch.float64).requires_grad_() for h in (4, 2, 2)]
    found = []
    for merge in (False, True):
        attention = SegmentAttention(batch, 16, merge=merge)
        out = attention.attend(*inputs, scale=None, window=window, softcap=None, dropout=0.0)
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for masked, apart in zip(*found, strict=True):
        torch.testing.assert_close(apart, masked, atol=1e-12, rtol=0)
    assert merged != bool(attention._masks)


def test_a_model_s_gradients_are_the_same_merged_or_masked():
    (batch,) = batches_of("shared")
    gradients = []
    for merge in (False, True):
        network = copy.deepcopy(tiny("Qwen3"))
        inputs, place_N = packed_inputs(network, batch)
        inputs["segments"] = SegmentAttention(batch, 16, merge=merge)
        packed_attention.enable(network)
        hidden = network.get_decoder()(**inputs, use_cache=False).last_hidden_state
        hidden[0, place_N].square().sum().backward()
        gradients.append([parameter.grad for parameter in network.get_decoder().parameters()])
    for masked, apart in zip(*gradients, strict=True):
        torch.testing.assert_close(apart, masked, atol=1e-9, rtol=0)


def test_the_cuda_kernels_take_the_same_pieces():
    """Fake tensors: the arguments of torch's CUDA kernels, and the shapes and dtypes of what they return."""
    with FakeTensorMode(), torch.no_grad():
        query = torch.empty(3, 4, 4, 64, dtype=torch.bfloat16, device="cuda")
        prefix, own = (torch.empty(3, 2, n, 64, dtype=torch.bfloat16, device="cuda") for n in (5, 4))
        context = SimpleNamespace(save_for_backward=lambda *saved: setattr(context, "saved_tensors", saved))
        out = _Merged.forward(context, query, prefix, prefix, own, own, 0.125)
        assert (out.shape, out.dtype, out.device.type) == (query.shape, torch.bfloat16, "cuda")
        assert context.saved_tensors[-1].dtype == torch.float32
        gradients = _Merged.backward(context, torch.empty_like(out))
        expected = [query, prefix, prefix, own, own]
        assert [(x.shape, x.dtype) for x in gradients[:-1]] == [(x.shape, x.dtype) for x in expected]


def test_no_flash_on_a_cpu_and_a_warning_for_fp32_on_cuda():
    query, key, _ = drawn(4, 2, torch.bfloat16)
    assert not takes_flash(query, key)
    assert slow_attention("cpu", torch.float32) is None
    assert slow_attention("cuda", torch.bfloat16) is None
    assert "model.dtype=float32: no flash attention" in slow_attention("cuda", torch.float32)


def test_on_a_gpu_long_completions_share_too():
    """16 completions of 4000 tokens behind 200: on a CPU the masked half is computed, on CUDA it is skipped."""
    group = (200, (4000,) * 16)
    work = {costs: [work_of([group], layout, 100_000, 4096, costs) for layout in ("packed", "shared")]
            for costs in (costs_of("cpu"), costs_of("cuda"))}  # fmt: skip
    assert work[CPU][0] < work[CPU][1] and work[CUDA][0] > work[CUDA][1]
    assert packed_work([(4, 4)], 10) != packed_work([(4, 4)], 10, CUDA)
