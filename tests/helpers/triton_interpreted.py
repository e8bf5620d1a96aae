"""The Triton kernels on CPU tensors. Run by test_kernels_triton.py in a process with TRITON_INTERPRET=1."""

import pytest
import torch
from kernel_cases import VOCABULARIES, assert_no_worse_than_naive, doubled, problem, results

CASES = ((0, 1.0, None, False), (1, 0.7, None, True), (31, 1.3, 3.0, True), (33, 1.0, 3.0, False))


@pytest.fixture(autouse=True)
def several_splits_and_blocks(monkeypatch):
    monkeypatch.setattr("rltrain.kernels.triton.PROGRAMS", 6)
    monkeypatch.setattr("rltrain.kernels.triton.BACKWARD_COLUMNS", 192)


def assert_close_to_truth(inputs, **options):
    truth = results(*doubled(*inputs), backend="reference", **options)
    for value, exact in zip(results(*inputs, backend="triton", **options), truth, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize(("entropy", "collision"), [(False, False), (True, True)])
@pytest.mark.parametrize("V", VOCABULARIES)
def test_equals_the_reference_in_fp64(V, entropy, collision):
    for N, temperature, softcap, bias in CASES:
        inputs = problem(N, V, D=40, dtype=torch.float32, bias=bias, scale=0.3)
        options = {"entropy": entropy, "collision": collision, "temperature": temperature, "softcap": softcap}
        assert_close_to_truth(inputs, **options)


def test_half_precision():
    # fp16 stands for bf16, whose bits the interpreter's dot product takes for integers.
    assert_no_worse_than_naive(problem(33, 129, 40, dtype=torch.float16), backend="triton", entropy=True)


def test_collision_without_entropy():
    inputs = problem(33, 257, D=40, dtype=torch.float32, bias=True, scale=0.3)
    assert_close_to_truth(inputs, collision=True, temperature=0.7)


def test_only_one_upstream_gradient_transposed_weight_and_shift():
    hidden_ND, weight_VD, targets_N, _ = problem(33, 129, 40, dtype=torch.float32, scale=0.3)
    weight_VD = weight_VD.detach().T.contiguous().T.requires_grad_()
    for g, e in ((1.0, 0.0), (0.0, 1.0)):
        assert_close_to_truth((hidden_ND, weight_VD, targets_N, None), entropy=True, g=g, e=e)
    far_below_V = torch.full((129,), -1e4)
    assert_no_worse_than_naive((hidden_ND, weight_VD, targets_N, far_below_V), backend="triton", entropy=True)


def test_masked_entries_weigh_nothing():
    hidden_ND, weight_VD, targets_N, _ = problem(9, 257, 40, dtype=torch.float32, scale=0.3)
    bias_V = torch.zeros(257)
    bias_V[:192] = -torch.inf
    assert_close_to_truth((hidden_ND, weight_VD, targets_N % 65 + 192, bias_V), entropy=True)
