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


def test_moments_are_those_of_plain_sums(bench):
    """g = (1, 0), (0, 2), (1, 2): norms 1, 4, 5; products of pairs 0, 1, 4, so a signal of 5/3."""
    vectors = [torch.tensor(v) for v in ([1.0, 0.0], [0.0, 2.0], [1.0, 2.0])]
    arm = bench.Arm(estimator=None, state={}, sketches=vectors, norms=[1.0, 4.0, 5.0])
    second, signal = bench.moments(arm, np.array([[1.0, 1.0, 1.0], [2.0, 0.0, 1.0]]))
    assert second.tolist() == pytest.approx([10 / 3, 7 / 3])
    # The second resample holds the first twice and the third once: its different pairs are 1·3 twice over, product 1.
    assert signal.tolist() == pytest.approx([5 / 3, 1.0])


def test_a_sketch_keeps_inner_products(bench):
    """Unbiased, with a standard deviation of about the product of the norms over sqrt(2^14) = 128."""
    generator = torch.Generator().manual_seed(1)
    x_D, y_D = torch.randn(2, 30_000, generator=generator)
    y_D = 0.5 * x_D + y_D
    sketch = bench.Sketch(30_000)
    exact, norms = float(x_D @ y_D), float(x_D.norm() * y_D.norm())
    assert abs(float(sketch(x_D) @ sketch(y_D)) - exact) < 4 * norms / 128
    assert torch.allclose(sketch(x_D + y_D), sketch(x_D) + sketch(y_D), atol=1e-4)
