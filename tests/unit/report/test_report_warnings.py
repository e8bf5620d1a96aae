"""Each warning of a report, on made numbers."""

import pytest

from rltrain.report.warnings import (
    accuracy_fell,
    all_warnings,
    entropy_collapse,
    length_explosion,
    no_learning,
    reward_without_accuracy,
    trend,
    truncated,
    verifier_trouble,
    zero_variance_groups,
)


def rows(**metrics):
    """One row per step; names hold ``__`` for a slash."""
    count = max(map(len, metrics.values()))
    named = {name.replace("__", "/"): values for name, values in metrics.items()}
    return [
        {"step": i + 1} | {name: values[i] for name, values in named.items() if i < len(values)} for i in range(count)
    ]


RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
FLAT = [0.4, 0.6] * 5


def test_trend_by_hand():
    """Fifths of ten are two: (0.1, 0.2) and (0.9, 1.0), each of sample variance 0.005."""
    found = trend(rows(reward=RISING), "reward")
    assert (found.first, found.last) == pytest.approx((0.15, 0.95))
    assert found.noise == pytest.approx((2 * 0.005 / 2) ** 0.5)
    assert found.rises and not found.falls
    assert trend(rows(reward=RISING[:9]), "reward") is None
    assert trend(rows(reward=[None] * 5 + RISING), "reward") == found


def test_no_learning_needs_flat_reward_and_flat_accuracy():
    assert no_learning(rows(reward=FLAT), evaluated=0) == "no learning seen: reward 0.5 → 0.5, noise ±0.28"
    assert no_learning(rows(reward=RISING), evaluated=0) is None
    # A rise of 0.2 on 100 problems: twice the standard error of the difference is 2·sqrt((0.21 + 0.25)/100) = 0.136.
    assert no_learning(rows(reward=FLAT, eval_accuracy=[0.3, 0.5]), evaluated=100) is None
    assert no_learning(rows(reward=FLAT, eval_accuracy=[0.3, 0.4]), evaluated=100) is not None


@pytest.mark.parametrize(("last", "warned"), [(0.3, True), (0.37, False), (0.6, False)])
def test_accuracy_that_fell(last, warned):
    """From 0.5 on 100 problems, beyond 2·sqrt((0.25 + p(1-p))/100), about 0.137."""
    found = accuracy_fell(rows(eval_accuracy=[0.5, last]), evaluated=100)
    assert (found == f"held-out accuracy fell: 0.5 → {last}") if warned else found is None


def test_reward_up_while_accuracy_is_not():
    flat = rows(reward=RISING, eval_accuracy=[0.5, 0.52])
    assert reward_without_accuracy(flat, evaluated=100) == (
        "reward rose (0.15 → 0.95) but accuracy did not (0.5 → 0.52): the reward may be hacked"
    )
    assert reward_without_accuracy(rows(reward=RISING, eval_accuracy=[0.5, 0.6]), evaluated=100) is None
    assert reward_without_accuracy(rows(reward=FLAT, eval_accuracy=[0.5, 0.5]), evaluated=100) is None


def test_without_evaluation_the_training_accuracy_decides():
    assert reward_without_accuracy(rows(reward=RISING, accuracy=FLAT), evaluated=0) is not None
    assert reward_without_accuracy(rows(reward=RISING, accuracy=RISING), evaluated=0) is None
    assert reward_without_accuracy(rows(reward=RISING), evaluated=0) is None


def test_rewards_that_know_no_accuracy_are_not_suspected():
    assert reward_without_accuracy(rows(reward=RISING, eval_accuracy=[0.0, 0.0]), evaluated=100) is None


@pytest.mark.parametrize(("last", "warned"), [(0.19, True), (0.21, False)])
def test_entropy_collapse_at_a_fifth(last, warned):
    found = entropy_collapse(rows(**{"entropy/sampled": [1.0] * 8 + [last] * 2}))
    assert (found == f"entropy collapsed: 1 → {last} nats a token") if warned else found is None


@pytest.mark.parametrize(("last", "warned"), [(150, True), (149, False)])
def test_length_explosion_at_one_and_a_half(last, warned):
    found = length_explosion(rows(completions__mean_length=[100.0] * 8 + [last] * 2))
    assert (found == f"completions grew from 100 to {last} tokens") if warned else found is None


def test_shares_of_the_last_fifth():
    cut = [1.0] * 8 + [0.1, 0.3]
    assert truncated(rows(completions__clipped_ratio=cut)).startswith("20% of the completions ran into")
    assert truncated(rows(completions__clipped_ratio=[1.0] * 8 + [0.1, 0.1])) is None
    assert zero_variance_groups(rows(frac_reward_zero_std=[0.0] * 8 + [0.75, 0.85])).startswith("80% of the groups")
    assert zero_variance_groups(rows(frac_reward_zero_std=[1.0] * 8 + [0.7, 0.7])) is None


def test_verifier_trouble_names_what_failed():
    failing = rows(
        rewards__answer__timeouts=[0.0, 0.1], verifier__timeout=[0.0, 0.0], verifier__infra=[0.02, 0.0], timeouts=[1.0]
    )
    assert verifier_trouble(failing) == (
        "rewards failed on some completions: rewards/answer/timeouts 5.00%, verifier/infra 1.00%"
    )
    assert verifier_trouble(rows(rewards__answer__errors=[0.0, None])) is None


def test_nothing_recorded_warns_of_nothing():
    assert all_warnings([], evaluated=0) == []
    assert all_warnings([{"step": 1}, {"step": 2, "reward": None}], evaluated=10) == []


def test_the_gravest_comes_first():
    hacked = rows(reward=RISING, eval_accuracy=[0.5, 0.2], completions__clipped_ratio=[0.5])
    kinds = [sentence.split()[0] for sentence in all_warnings(hacked, evaluated=100)]
    assert kinds == ["reward", "held-out", "50%"]
