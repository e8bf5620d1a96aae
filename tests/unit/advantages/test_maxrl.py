"""MaxRL by hand, and what its expected estimate is the gradient of."""

import itertools

import pytest
from advantage_groups import make_group

from rltrain.advantages.maxrl import MaxRLConfig, maxrl, maxrl_advantages
from rltrain.errors import RunError
from rltrain.types import Context


def test_hand_computed():
    """Two right of eight: mean 1/4, (1 - 1/4)/(1/4) = 3 and -1. Partial credit: mean 1/2, (3/4 - 1/2)/(1/2) = 1/2."""
    assert maxrl_advantages([1, 0, 0, 0, 0, 1, 0, 0]).tolist() == [3.0, -1, -1, -1, -1, 3.0, -1, -1]
    assert maxrl_advantages([0.75, 0.25]).tolist() == [0.5, -0.5]
    assert maxrl_advantages([1.0, None, 0.0]).tolist() == [1.0, 0.0, -1.0]
    (rows,) = maxrl([make_group([(1, 2), (3,)], [1.0, 0.0])], MaxRLConfig(), Context()).values
    assert [row_T.tolist() for row_T in rows] == [[1.0, 1.0], [-1.0]]


@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_its_expectation_is_the_gradient_of_the_first_terms_of_log_p(size, p):
    """One decision, right with p = sigmoid(x): grad log pi is 1 - p where right and -p where wrong, and dp/dx = p(1-p).

    E[(1/G) sum A·grad log pi] = sum_{k=1}^{G-1} (1-p)^(k-1)·dp/dx.
    """
    expected = 0.0
    for rewards in itertools.product([0.0, 1.0], repeat=size):
        probability = p ** sum(rewards) * (1 - p) ** (size - sum(rewards))
        terms = zip(maxrl_advantages(rewards).tolist(), rewards, strict=True)
        expected += probability * sum(a * (reward - p) for a, reward in terms) / size
    assert expected == pytest.approx(sum((1 - p) ** (k - 1) for k in range(1, size)) * p * (1 - p), abs=1e-12)


def test_a_negative_reward_is_refused():
    with pytest.raises(
        RunError, match=r"problem q: the reward -0.5 is negative, .*; choose rewards that are 0 or more"
    ):
        maxrl([make_group([(1,), (2,)], [1.0, -0.5], name="q")], MaxRLConfig(), Context())
