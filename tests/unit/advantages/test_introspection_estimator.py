"""Differences of predicted values."""

import pytest
import torch
from advantage_groups import make_group

from rltrain.advantages.estimator import estimator_of
from rltrain.types import Context

VALUES = [[torch.tensor([0.5, 0.6, 0.2]), torch.tensor([0.5]), torch.tensor([0.9, 0.1])]]


def estimate(**options):
    groups = [make_group([[1, 2, 3], [4], [5, 6]], [1.0, 0.0, None])]
    return estimator_of("introspection", options)(groups, Context(values=lambda groups: VALUES))


def test_differences_by_hand():
    """0.6 - 0.5, 0.2 - 0.6, and the reward behind the last token; an abstention has 0."""
    found = estimate()
    assert [row.tolist() for row in found.values[0]] == [
        pytest.approx([0.1, -0.4, 0.8]),
        pytest.approx([-0.5]),
        [0.0, 0.0],
    ]
    # (V - 1)² = 0.25, 0.16, 0.64 and (V - 0)² = 0.25
    assert (found.metrics["introspection/value_error"].total, found.metrics["introspection/value_error"].count) == (
        pytest.approx(1.3),
        4,
    )


def test_they_sum_to_the_reward_less_the_first_value():
    assert [float(row.sum()) for row in estimate().values[0]] == pytest.approx([0.5, -0.5, 0.0])


def test_whitened_over_the_tokens_that_count():
    plain = torch.tensor([0.1, -0.4, 0.8, -0.5], dtype=torch.float64)
    expected = (plain - plain.mean()) / (plain.std(correction=0) + 1e-8)
    found = estimate(whiten=True).values[0]
    torch.testing.assert_close(torch.cat(found[:2]), expected, rtol=1e-6, atol=1e-6)
    assert found[2].tolist() == [0.0, 0.0]
