"""scripts/bench/regression.py: its moments against plain sums, and its sketch against exact inner products."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

PATH = Path(__file__).parents[3] / "scripts" / "bench" / "regression.py"


@pytest.fixture(scope="module")
def bench():
    name = "regression_bench"
    spec = importlib.util.spec_from_file_location(name, PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def made_arm(bench, vectors, metric="plain"):
    arm = bench.Arm()
    arm.norms[metric] = [float(vector.square().sum()) for vector in vectors]
    arm.sketches[metric] = list(vectors)
    return arm


def test_moments_are_those_of_plain_sums(bench):
    """g = (1, 0), (0, 2), (1, 2): norms 1, 4, 5; products of pairs 0, 1, 4, so a signal of 5/3."""
    arm = made_arm(bench, [torch.tensor(v) for v in ([1.0, 0.0], [0.0, 2.0], [1.0, 2.0])])
    second, signal = bench.moments(arm, "plain", np.array([[1.0, 1.0, 1.0], [2.0, 0.0, 1.0]]))
    assert second.tolist() == pytest.approx([10 / 3, 7 / 3])
    # The second resample holds the first twice and the third once: its different pairs are 1·3 twice over, product 1.
    assert signal.tolist() == pytest.approx([5 / 3, 1.0])


def test_gradients_of_many_weights_need_as_many_passes_as_their_rank(bench):
    """The third row is the sum of the first two. Against a backward pass of each."""
    x_D = torch.tensor([0.3, -1.0, 2.0], requires_grad=True)
    logprobs_N = torch.stack([x_D[0] * x_D[1], x_D[2] ** 2, x_D.sum()])
    weights_KN = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0], [1.0, 1.0, 1.0]])
    mix_KR, basis_RD = bench.spanning_gradients(logprobs_N, weights_KN, [x_D])
    assert len(basis_RD) == 2
    for row_N, flat_D in zip(weights_KN, mix_KR @ basis_RD, strict=True):
        (expected_D,) = torch.autograd.grad((row_N * logprobs_N).sum(), x_D, retain_graph=True)
        torch.testing.assert_close(flat_D, expected_D, atol=1e-5, rtol=1e-5)
    none_KR, nothing_RD = bench.spanning_gradients(logprobs_N, 0 * weights_KN, [x_D])
    assert none_KR.shape == (3, 0) and nothing_RD.shape == (0, 3)


def test_the_bound_has_the_coefficients_of_the_other_half(bench):
    """Two coordinates, g_0 = (3, 4) in each group, and features (1, 0), (0, 0), (0, 2). So c = (3, ., 2), rest 0.

    In the odd groups the first feature is (2, 0): c = 3/2 there. Even groups judged with it keep 3 - 3/2 = 3/2, odd
    groups with 3 keep 3 - 6 = -3.
    """
    judged = bench.Judged(arms={}, terms={}, products={"plain": [], "adam": []})
    rows = [torch.tensor([[3.0, 4.0], [1.0 + index % 2, 0.0], [0.0, 0.0], [0.0, 2.0]]) for index in range(4)]
    judged.products["plain"] = [(row @ row.T).double() for row in rows]
    judged.products["adam"] = judged.products["plain"]
    for place, name in enumerate(bench.TERMS):
        judged.terms[name] = made_arm(bench, [row[place] for row in rows])
        judged.terms[name].sketches["adam"] = judged.terms[name].sketches["plain"]
    arm = bench.bound(judged, "plain")
    assert arm.norms["plain"] == pytest.approx([2.25, 9.0, 2.25, 9.0], abs=1e-6)
    assert [row.tolist() for row in arm.sketches["adam"][:2]] == [pytest.approx([1.5, 0]), pytest.approx([-3, 0])]


def test_a_sketch_keeps_inner_products(bench):
    """Unbiased, with a standard deviation of about the product of the norms over sqrt(2^12) = 64."""
    generator = torch.Generator().manual_seed(1)
    x_D, y_D = torch.randn(2, 30_000, generator=generator)
    y_D = 0.5 * x_D + y_D
    sketch = bench.Sketch(30_000)
    exact, norms = float(x_D @ y_D), float(x_D.norm() * y_D.norm())
    assert abs(float(sketch(x_D) @ sketch(y_D)) - exact) < 4 * norms / 64
    assert torch.allclose(sketch(x_D + y_D), sketch(x_D) + sketch(y_D), atol=1e-4)
