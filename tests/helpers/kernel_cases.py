"""Inputs and expectations that the tests of every kernel backend share."""

import torch

from rltrain import kernels

VOCABULARIES = (1, 127, 129, 257, 1000, 997)


def problem(N, V, D=8, *, dtype=torch.float64, bias=False, scale=1.0, seed=0):
    """hidden, weight, targets (edges of tiles of 64 first), bias or None; all but targets want gradients."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(N, D, generator=generator, dtype=torch.float64).mul(scale).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias_V = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    edges = torch.tensor([V - 1, 0, 63, 64, 127, 128, 191]) % V
    targets_N = torch.cat([edges, torch.randint(V, (max(N - 7, 0),), generator=generator)])[:N]
    return hidden_ND, weight_VD, targets_N, bias_V


def doubled(hidden_ND, weight_VD, targets_N, bias_V):
    """The same problem in fp64."""
    hidden_ND, weight_VD, bias_V = (
        None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)
        for tensor in (hidden_ND, weight_VD, bias_V)
    )
    return hidden_ND, weight_VD, targets_N, bias_V


def results(
    hidden_ND, weight_VD, targets_N, bias_V, *, backend, entropy=False, collision=False, g=1.0, e=1.0, **options
):
    """Log-probs, entropies, collisions, and gradients of the first two for upstreams that differ by row and sign."""
    logprobs_N, entropy_N, *rest = kernels.token_logprobs(
        hidden_ND, weight_VD, targets_N, bias_V=bias_V, backend=backend, entropy=entropy, collision=collision, **options
    )
    assert not any(value.requires_grad for value in rest)
    upstream_N = torch.linspace(-1, 2, len(targets_N), dtype=logprobs_N.dtype)
    outputs, upstreams = [logprobs_N], [upstream_N * g]
    if entropy_N is not None:
        outputs, upstreams = [logprobs_N, entropy_N], [upstream_N * g, upstream_N.square() * e]
    kept = [(value, upstream) for value, upstream, on in zip(outputs, upstreams, (g, e), strict=False) if on]
    leaves = [tensor for tensor in (hidden_ND, weight_VD, bias_V) if tensor is not None and tensor.requires_grad]
    values, grads = zip(*kept, strict=True)
    return [value.detach() for value in outputs] + rest + list(torch.autograd.grad(values, leaves, grads))


def assert_no_worse_than_naive(inputs, *, backend, **options):
    """Each result's error against fp64 truth is at most twice that of the plain path in the same precision.

    An absolute last bit of room is for results that the plain path happens to hit exactly.
    """
    truth = results(*doubled(*inputs), backend="reference", **options)
    naive = results(*inputs, backend="reference", **options)
    for value, plain, exact in zip(results(*inputs, backend=backend, **options), naive, truth, strict=True):
        room = torch.finfo(value.dtype).eps * exact.abs().max()
        assert (value - exact).abs().max() <= 2 * (plain - exact).abs().max() + room
        assert (value - exact).norm() <= 2 * (plain - exact).norm() + room
