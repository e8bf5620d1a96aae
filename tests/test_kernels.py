"""Token log-probs: every backend against the readable one, fp64 truth, closed forms and invariances."""

import itertools

import pytest
import torch

from rltrain import kernels

VOCABULARIES = (1, 127, 129, 257, 1000, 997)


def problem(N, V, D=8, *, dtype=torch.float64, bias=False, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(N, D, generator=generator, dtype=torch.float64).mul(scale).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias_V = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden_ND, weight_VD, torch.randint(V, (N,), generator=generator), bias_V


def results(hidden_ND, weight_VD, targets_N, bias_V, *, backend, entropy, **options):
    """Log-probs, entropies and gradients for upstream gradients that differ by row."""
    logprobs_N, entropy_N = kernels.token_logprobs(
        hidden_ND, weight_VD, targets_N, bias_V=bias_V, backend=backend, entropy=entropy, **options
    )
    upstream_N = torch.linspace(-1, 2, len(targets_N), dtype=logprobs_N.dtype)
    loss = (logprobs_N * upstream_N).sum()
    if entropy_N is not None:
        loss = loss + (entropy_N * upstream_N.square()).sum()
    leaves = [tensor for tensor in (hidden_ND, weight_VD, bias_V) if tensor is not None]
    values = [logprobs_N] if entropy_N is None else [logprobs_N, entropy_N]
    return [value.detach() for value in values] + list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("entropy", [False, True])
def test_blocked_equals_reference(V, entropy, monkeypatch):
    monkeypatch.setattr("rltrain.kernels.blocked.block_columns", lambda rows: 64)
    for N, temperature, softcap, bias in itertools.product((0, 1, 5), (1.0, 0.7), (None, 3.0), (False, True)):
        inputs = problem(N, V, bias=bias)
        options = {"entropy": entropy, "temperature": temperature, "softcap": softcap}
        expected = results(*inputs, backend="reference", **options)
        for value, reference in zip(results(*inputs, backend="blocked", **options), expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-12)
