"""Token log-probs on the torch paths: the readable one, fp64 truth, closed forms and invariances."""

import itertools
import math

import pytest
import torch
from kernel_cases import VOCABULARIES, assert_no_worse_than_naive, doubled, problem, results

from rltrain import kernels
from rltrain.kernels import fused as fused_module
from rltrain.kernels import head as head_module
from rltrain.kernels.online import Partial, merge


@pytest.fixture(autouse=True)
def narrow_blocks(monkeypatch):
    """Many blocks and chunks at test sizes."""
    monkeypatch.setattr("rltrain.kernels.blocked.block_columns", lambda rows: 64)
    monkeypatch.setattr("rltrain.kernels.fused.BLOCK_COLUMNS", 64)
    monkeypatch.setattr("rltrain.kernels.fused.MIN_CHUNK_ROWS", 16)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, {0: 16, 100: 112, 256: 128, 700: 176, 1024: 256, 4096: 512}),
        (torch.bfloat16, {0: 16, 100: 112, 256: 256, 300: 256, 700: 352, 4096: 512}),
    ],
)
def test_chunks_are_a_quarter_of_the_rows_or_half_in_16_bits_within_bounds(dtype, expected, monkeypatch):
    monkeypatch.setattr("rltrain.kernels.fused.MIN_CHUNK_ROWS", 128)
    head = head_module.Head(weight_VD=torch.zeros(1, 1, dtype=dtype), bias_V=None, temperature=1.0, softcap=None)
    assert {rows: fused_module.chunk_rows(head, rows) for rows in expected} == expected


def fused_results(hidden_ND, weight_VD, targets_N, bias_V, *, entropy, **options):
    """What ``results`` returns, through the fused path; the loss is linear, so upstream gradients are the same."""
    upstream_N = torch.linspace(-1, 2, len(targets_N), dtype=hidden_ND.dtype)

    def token_loss(logprobs_n, entropy_n, rows):
        linear = logprobs_n * upstream_N[rows]
        return linear if entropy_n is None else linear + entropy_n * upstream_N[rows].square()

    fused = kernels.fused_token_loss(
        hidden_ND, weight_VD, targets_N, token_loss, bias_V=bias_V, entropy=entropy, **options
    )
    leaves = [tensor for tensor in (hidden_ND, weight_VD, bias_V) if tensor is not None]
    values = [fused.logprobs_N] if fused.entropy_N is None else [fused.logprobs_N, fused.entropy_N]
    return values + list(torch.autograd.grad(fused.loss, leaves))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("V", VOCABULARIES)
def test_blocked_and_fused_equal_the_reference(V, entropy):
    for N, temperature, softcap, bias in itertools.product((0, 1, 15, 17), (1.0, 0.7), (None, 3.0), (False, True)):
        inputs = problem(N, V, bias=bias)
        options = {"entropy": entropy, "temperature": temperature, "softcap": softcap}
        expected = results(*inputs, backend="reference", **options)
        for actual in (results(*inputs, backend="blocked", **options), fused_results(*inputs, **options)):
            for value, reference in zip(actual, expected, strict=True):
                torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-12)


def test_reference_equals_hand_computed_numbers():
    # Logits 0 and log 3: p = 1/4, 3/4. d log p_0 / dz = (3/4, -3/4); dH/dz_j = -p_j(log p_j + H).
    hidden_ND = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    weight_VD = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64, requires_grad=True)
    for backend in ("reference", "blocked"):
        logprobs_N, entropy_N = kernels.token_logprobs(
            hidden_ND, weight_VD, torch.tensor([0]), entropy=True, backend=backend
        )
        entropy = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
        assert logprobs_N.item() == pytest.approx(-math.log(4), abs=1e-15)
        assert entropy_N.item() == pytest.approx(entropy, abs=1e-15)
        assert torch.autograd.grad(logprobs_N.sum(), weight_VD, retain_graph=True)[0].flatten().tolist() == (
            pytest.approx([0.75, -0.75], abs=1e-15)
        )
        slope = -0.25 * (-math.log(4) + entropy)
        assert torch.autograd.grad(entropy_N.sum(), weight_VD)[0].flatten().tolist() == (
            pytest.approx([slope, -slope], abs=1e-15)
        )


@pytest.mark.parametrize(("g", "e"), [(1.0, 0.0), (0.0, 1.0)])
def test_only_one_upstream_gradient(g, e):
    inputs = problem(17, 129)
    options = {"entropy": True, "g": g, "e": e}
    expected = results(*inputs, backend="reference", **options)
    for value, reference in zip(results(*inputs, backend="blocked", **options), expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    hidden_ND, weight_VD, targets_N, bias_V = problem(3, 67, 2, bias=True)

    def outputs(hidden_ND, weight_VD, bias_V):
        return kernels.token_logprobs(
            hidden_ND, weight_VD, targets_N, entropy=True, temperature=0.8, bias_V=bias_V, softcap=softcap,
            backend="blocked",
        )  # fmt: skip

    assert torch.autograd.gradcheck(outputs, (hidden_ND, weight_VD, bias_V))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_error_is_bounded_by_the_plain_path(dtype, scale):
    assert_no_worse_than_naive(problem(65, 997, 32, dtype=dtype, scale=scale), backend="blocked", entropy=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_error_is_bounded_by_the_plain_path(dtype):
    inputs = problem(65, 997, 32, dtype=dtype)
    truth = results(*doubled(*inputs), backend="reference", entropy=True)
    naive = results(*inputs, backend="reference", entropy=True)
    for value, plain, exact in zip(fused_results(*inputs, entropy=True), naive, truth, strict=True):
        assert (value - exact).norm() <= 2 * (plain - exact).norm()


def naive_collision(hidden_ND, weight_VD, targets_N, bias_V, *, temperature=1.0, softcap=None):
    """Σ p² from whole fp64 logits of the same numbers."""
    logits_NV = hidden_ND.detach().double() @ weight_VD.detach().double().T
    logits_NV = logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)
    logits_NV = logits_NV if bias_V is None else logits_NV + bias_V.detach().double()
    return (logits_NV / temperature).softmax(-1).square().sum(-1)


def collisions(hidden_ND, weight_VD, targets_N, bias_V, **options):
    """Of every path on a CPU, with and without entropy."""
    for entropy in (False, True):
        fused = kernels.fused_token_loss(
            hidden_ND, weight_VD, targets_N, lambda n, *_: n, bias_V=bias_V, entropy=entropy, collision=True, **options
        )
        yield fused.collision_N
        for backend in ("reference", "blocked"):
            yield kernels.token_logprobs(
                hidden_ND, weight_VD, targets_N, bias_V=bias_V, entropy=entropy, collision=True, backend=backend,
                **options,
            )[2]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", VOCABULARIES)
def test_collision_equals_the_naive_sum_in_fp64(V, dtype):
    """In bf16 the products are rounded, to 2^-9 of logits of a few units."""
    close = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.1}[dtype]
    for N, temperature, softcap, bias in ((0, 1.0, None, False), (1, 0.7, 3.0, False), (17, 1.3, None, True)):
        inputs, options = problem(N, V, dtype=dtype, bias=bias), {"temperature": temperature, "softcap": softcap}
        expected_N = naive_collision(*inputs, **options)
        for collision_N in collisions(*inputs, **options):
            assert not collision_N.requires_grad
            torch.testing.assert_close(collision_N.double(), expected_N, rtol=close, atol=0)


def test_collision_by_hand_and_by_half_the_temperature():
    """p = (1/4, 3/4): 10/16. Σ p² = e^(lse(2z) - 2 lse(z)); lse(z) = z_y - log p(y); 2z is z at T/2."""
    weight_VD = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    for collision_N in collisions(torch.ones(1, 1, dtype=torch.float64), weight_VD, torch.tensor([0]), None):
        assert collision_N.item() == pytest.approx(10 / 16, abs=1e-15)
    hidden_ND, weight_VD, targets_N, _ = problem(17, 257)
    target_logits_N = (hidden_ND * weight_VD[targets_N]).sum(-1)
    lse_N, lse_half_N = (
        target_logits_N / T - kernels.token_logprobs(hidden_ND, weight_VD, targets_N, temperature=T)[0]
        for T in (0.8, 0.4)
    )
    for collision_N in collisions(hidden_ND, weight_VD, targets_N, None, temperature=0.8):
        torch.testing.assert_close(collision_N, (lse_half_N - 2 * lse_N).exp(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_collision_changes_no_other_result(backend):
    inputs = problem(17, 257, bias=True)
    plain = results(*inputs, backend=backend, entropy=True)
    logprobs_N, entropy_N, _, *gradients = results(*inputs, backend=backend, entropy=True, collision=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, [logprobs_N, entropy_N, *gradients], strict=True))


def test_all_logits_far_below_zero_and_shifted():
    inputs = problem(9, 129)
    low = (*inputs[:3], torch.full((129,), -1e4, dtype=torch.float64))
    for backend in ("reference", "blocked"):
        expected = results(*inputs, backend=backend, entropy=True)
        for value, unshifted in zip(results(*low, backend=backend, entropy=True), expected, strict=True):
            torch.testing.assert_close(value, unshifted, rtol=1e-9, atol=1e-10)


def test_logprobs_are_never_positive_and_tails_weigh_nothing():
    # A confident head whose logits are all negative: a tail counted as logit 0 would take the whole mass.
    hidden_ND = torch.ones(2, 1)
    weight_VD = torch.full((129, 1), -90.0)
    weight_VD[128] = -50.0
    logprobs_N, entropy_N = kernels.token_logprobs(
        hidden_ND, weight_VD, torch.tensor([128, 0]), entropy=True, backend="blocked"
    )
    assert logprobs_N.tolist() == [0.0, -40.0]
    assert entropy_N.tolist() == pytest.approx([0.0, 0.0], abs=1e-13)


def test_gradient_by_logits_sums_to_zero():
    # With a bias, db summed over V is the sum of all dlogits.
    *_, bias_grad_V = results(*problem(17, 257, bias=True), backend="blocked", entropy=True)
    assert bias_grad_V.sum().item() == pytest.approx(0, abs=1e-12)


def test_bias_of_minus_infinity_equals_a_smaller_vocabulary():
    hidden_ND, weight_VD, targets_N, _ = problem(9, 127)
    bias_V = torch.zeros(200, dtype=torch.float64)
    bias_V[127:] = -torch.inf
    padded_VD = torch.cat([weight_VD.detach(), torch.randn(73, 8, dtype=torch.float64)]).requires_grad_()
    expected = results(hidden_ND, weight_VD, targets_N, None, backend="reference", entropy=True)
    for backend in ("reference", "blocked"):
        actual = results(hidden_ND, padded_VD, targets_N, bias_V, backend=backend, entropy=True)
        assert actual[-1][127:].abs().max() == 0
        actual[-1] = actual[-1][:127]
        for value, reference in zip(actual, expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-12)


def test_tied_transposed_and_frozen_weights():
    _, weight_VD, targets_N, _ = problem(9, 129)
    grads = []
    for backend in ("reference", "blocked"):
        tied_VD = weight_VD.detach().T.contiguous().T.requires_grad_()
        hidden_ND = tied_VD[:9] * 0.5
        logprobs_N, _ = kernels.token_logprobs(hidden_ND, tied_VD, targets_N, backend=backend)
        grads.append(torch.autograd.grad(logprobs_N.sum(), tied_VD)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-11, atol=1e-12)

    hidden_ND, weight_VD, targets_N, _ = problem(9, 129)
    both = results(hidden_ND, weight_VD, targets_N, None, backend="blocked")
    frozen = results(hidden_ND, weight_VD.detach(), targets_N, None, backend="blocked")
    assert len(frozen) == 2 and torch.equal(frozen[1], both[1])


def test_two_shards_merged_equal_one():
    logits_NV = torch.randn(5, 40, dtype=torch.float64) * 5
    whole, *parts = (
        head_module.partial(x[None].clone(), torch.empty_like(x[None]), entropy=True, collision=True)
        for x in (logits_NV, *logits_NV.split([13, 27], 1))
    )
    identity = Partial.identity(whole.max_N, entropy=True, collision=True)
    for merged in (merge(*parts), merge(parts[1], parts[0]), merge(merge(identity, whole), identity)):
        torch.testing.assert_close(merged.lse_N, logits_NV.logsumexp(1), rtol=1e-14, atol=1e-14)
        exact_N = torch.distributions.Categorical(logits=logits_NV).entropy()
        torch.testing.assert_close(merged.entropy_N, exact_N, rtol=1e-12, atol=1e-13)
        exact_N = logits_NV.softmax(-1).square().sum(-1)
        torch.testing.assert_close(merged.collision_N, exact_N, rtol=1e-12, atol=0)
    assert merge(identity, identity).sum_N.tolist() == [0.0] * 5


def test_blocks_of_many_rows_are_not_split():
    head = head_module.Head(weight_VD=torch.zeros(1024, 1), bias_V=None, temperature=1.0, softcap=None)
    shapes = {rows: head.tile(rows, slice(0, 1024)) for rows in (0, 512, 520, 1024, 1030, 4096)}
    pieces = {0: 4, 512: 4, 520: 2, 1024: 2, 1030: 1, 4096: 1}
    assert shapes == {rows: (k, rows, 1024 // k) for rows, k in pieces.items()}


def test_the_pieces_of_a_block_are_its_columns():
    """[K, N, c] of 12 columns is four pieces of three, of 13 one; statistics and places of targets are the same."""
    weight_VD, hidden_ND = torch.randn(25, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    head = head_module.Head(weight_VD=weight_VD, bias_V=None, temperature=1.0, softcap=None)
    logits_NV, targets_N = hidden_ND @ weight_VD.T, torch.tensor([3, 12, 11, 24, 0])
    for block, shape in ((slice(0, 12), (4, 5, 3)), (slice(12, 25), (1, 5, 13))):
        tile_KNc = head_module.logits_(head, hidden_ND, block, head_module.Scratch(head, 65, spare=False)).clone()
        assert tile_KNc.shape == shape == head.tile(5, block)
        torch.testing.assert_close(tile_KNc.transpose(0, 1).flatten(1), logits_NV[:, block], rtol=0, atol=1e-15)
        found = head_module.targets_within(targets_N, block, shape[2])
        torch.testing.assert_close(tile_KNc[found], logits_NV[found[1], targets_N[found[1]]], rtol=0, atol=1e-15)
        statistics = head_module.partial(tile_KNc, torch.empty_like(tile_KNc), entropy=True)
        torch.testing.assert_close(statistics.lse_N, logits_NV[:, block].logsumexp(1), rtol=1e-14, atol=1e-14)


def test_fused_without_gradient_makes_none():
    hidden_ND, weight_VD, targets_N, bias_V = problem(17, 129, bias=True)
    with torch.no_grad():
        fused = kernels.fused_token_loss(hidden_ND, weight_VD, targets_N, lambda n, *_: -n, bias_V=bias_V)
    expected = kernels.token_logprobs(hidden_ND, weight_VD, targets_N, bias_V=bias_V, backend="reference")[0].detach()
    assert not fused.loss.requires_grad
    torch.testing.assert_close(fused.logprobs_N, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("entropy", [False, True])
def test_fused_where_most_exponentials_vanish(entropy):
    """A target 400 nats below the maximum: in fp32 its e^{z-m} is 0, its log-prob and its gradient are not."""
    hidden_ND = torch.tensor([[1.0, 0.5]], requires_grad=True)
    weight_VD = (torch.linspace(-200, 200, 402).reshape(201, 2)).requires_grad_()
    inputs = (hidden_ND, weight_VD, torch.tensor([0]), None)
    truth = results(*doubled(*inputs), backend="reference", entropy=entropy)
    for value, exact in zip(fused_results(*inputs, entropy=entropy), truth, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-12)  # z is rounded to 2e-5


def test_fused_clipped_ratio_equals_autograd_and_scales_with_upstream():
    hidden_ND, weight_VD, targets_N, _ = problem(70, 129)
    old_N = torch.randn(70, dtype=torch.float64).sub(4)
    advantages_N = torch.randn(70, dtype=torch.float64)

    def token_loss(logprobs_n, entropy_n, rows):
        ratio_n = (logprobs_n - old_N[rows]).exp()
        clipped_n = ratio_n.clamp(0.8, 1.2) * advantages_N[rows]
        return -torch.minimum(ratio_n * advantages_N[rows], clipped_n) - 0.01 * entropy_n

    logprobs_N, entropy_N = kernels.token_logprobs(hidden_ND, weight_VD, targets_N, entropy=True, backend="reference")
    loss = token_loss(logprobs_N, entropy_N, slice(0, 70)).sum()
    expected = torch.autograd.grad(loss * 3, (hidden_ND, weight_VD))
    fused = kernels.fused_token_loss(hidden_ND, weight_VD, targets_N, token_loss, entropy=True)
    torch.testing.assert_close(fused.loss, loss, rtol=1e-12, atol=0)
    actual = torch.autograd.grad(fused.loss * 3, (hidden_ND, weight_VD), retain_graph=True)
    for value, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-12)
    with pytest.raises(RuntimeError, match="call backward once"):
        fused.loss.backward()


def test_the_door_says_what_it_takes_and_refuses_what_does_not_fit():
    small, large = torch.zeros(4, 2), torch.zeros(2**19, 2)
    assert kernels.choose_backend(small, small) == "reference"
    assert kernels.choose_backend(small, large) == "blocked"
    targets_N = torch.zeros(4, dtype=torch.long)
    for arguments, options, message in (
        ((small, torch.zeros(5, 3), targets_N), {}, r"need \[N, D\] and \[V, D\]"),
        ((small, small.double(), targets_N), {}, "one precision"),
        ((small, small, targets_N[:3]), {}, r"need \(4,\)"),
        ((small, small, targets_N + 4), {}, r"must lie in \[0, 4\)"),
        ((small, small, targets_N), {"temperature": 0.0}, "must be > 0"),
        ((small, small, targets_N), {"backend": "cuda"}, "choose auto or one of reference, blocked, triton"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.token_logprobs(*arguments, **options)
