"""policy_loss against closed forms and hand-computed numbers."""

import dataclasses

import pytest
import torch
from loss_batches import batch

from rltrain.errors import ConfigError
from rltrain.loss import importance_weights, kl_estimate, policy_loss
from rltrain.losses.surrogate import SurrogateConfig


def gradient(logprobs, one_batch, config) -> torch.Tensor:
    logprobs = torch.as_tensor(logprobs, dtype=torch.float64).requires_grad_()
    policy_loss(logprobs, one_batch, config).loss.backward()
    return logprobs.grad


@pytest.mark.parametrize("config", [
    SurrogateConfig(), SurrogateConfig(clip_high=0.28, dual_clip=3.0),
    SurrogateConfig(surrogate="cispo", clip_high=4.0), SurrogateConfig(surrogate="reinforce"),
])  # fmt: skip
def test_at_ratio_one_the_gradient_is_minus_weighted_advantage(config):
    """d loss / d logprob_n = -w_n·A_n for every surrogate whose ratio is per token."""
    one = batch([1.5, -0.5, 0.25], weights=[0.2, 0.3, 0.5], old=[-1.0, -2.0, -0.5])
    torch.testing.assert_close(
        gradient([-1.0, -2.0, -0.5], one, config), torch.tensor([-0.3, 0.15, -0.125], dtype=torch.float64)
    )


def test_sequence_ratio_spreads_the_gradient_over_its_tokens():
    """GSPO at ratio 1: each token of a sequence gets -A/len of the sequence's total weight."""
    one = batch([2.0, 2.0, 2.0, -1.0], weights=[1 / 6] * 3 + [1 / 2], lengths=[3, 1])
    config = SurrogateConfig(ratio="sequence", clip_low=3e-4, clip_high=4e-4)
    expected = torch.tensor([-1 / 3] * 3 + [0.5], dtype=torch.float64)
    torch.testing.assert_close(gradient([0.0] * 4, one, config), expected)


def test_sequence_ratio_is_the_geometric_mean():
    one = batch([1.0, 1.0], weights=[0.5, 0.5], lengths=[2])
    config = SurrogateConfig(ratio="sequence", clip_high=10.0)
    loss = policy_loss(torch.tensor([0.3, 0.1], dtype=torch.float64), one, config).loss
    torch.testing.assert_close(loss, -torch.tensor(0.2, dtype=torch.float64).exp())


def test_clip_by_hand():
    """Ratios 1.5 and 0.5 with advantages of both signs: min(rho·A, clip(rho)·A)."""
    logprobs = torch.tensor([1.5, 1.5, 0.5, 0.5], dtype=torch.float64).log()
    one = batch([1.0, -1.0, 1.0, -1.0], weights=[1.0] * 4)
    output = policy_loss(logprobs, one, SurrogateConfig(clip_low=0.2, clip_high=0.28))
    torch.testing.assert_close(output.loss, torch.tensor(-1.28 + 1.5 - 0.5 + 0.8, dtype=torch.float64))
    assert output.metrics["clip_ratio/high_mean"].total == 1
    assert output.metrics["clip_ratio/low_mean"].total == 1
    assert output.metrics["clip_ratio/region_mean"].count == 4


def test_clipped_tokens_have_no_gradient():
    logprobs = torch.tensor([1.5, 0.5], dtype=torch.float64).log()
    one = batch([1.0, -1.0], weights=[1.0, 1.0])
    assert gradient(logprobs, one, SurrogateConfig()).tolist() == [0.0, 0.0]


def test_dual_clip_bounds_the_loss_of_negative_advantages():
    logprobs = torch.tensor([5.0, 5.0], dtype=torch.float64).log()
    one = batch([-1.0, 1.0], weights=[1.0, 1.0])
    loss = policy_loss(logprobs, one, SurrogateConfig(dual_clip=3.0)).loss
    torch.testing.assert_close(loss, torch.tensor(3.0 - 1.2, dtype=torch.float64))


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    """The capped ratio is a constant: d loss / d logprob = -min(rho, 1 + eps)·A·w."""
    logprobs = torch.tensor([8.0, 0.5], dtype=torch.float64).log()
    one = batch([1.0, -1.0], weights=[1.0, 1.0])
    expected = torch.tensor([-5.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(gradient(logprobs, one, SurrogateConfig(surrogate="cispo", clip_high=4.0)), expected)


def test_kl_estimators_by_hand():
    """d = log ref - log pi = ln 2: k1 = -d, k2 = d²/2, k3 = e^d - d - 1 = 1 - ln 2."""
    logprob, reference = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([-1.0 + 0.6931471805599453])
    for name, expected in {"k1": -0.6931471805599453, "k2": 0.2402265069591007, "k3": 0.3068528194400547}.items():
        assert float(kl_estimate(logprob, reference.double(), name)) == pytest.approx(expected, abs=1e-7)


def test_k3_and_k2_average_to_the_true_kl_gradient():
    """Over the whole distribution: E[k1] = E[k3] = KL, and k2's loss has KL's gradient."""
    policy = torch.randn(7, dtype=torch.float64).log_softmax(0)
    reference = torch.randn(7, dtype=torch.float64).log_softmax(0)
    truth = (policy.exp() * (policy - reference)).sum()
    for name in ("k1", "k3"):
        torch.testing.assert_close((policy.exp() * kl_estimate(policy, reference, name)).sum(), truth)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    true_gradient = torch.autograd.grad(
        (logits.softmax(0) * (logits.log_softmax(0) - reference)).sum(), logits
    )[0]  # fmt: skip
    logp = logits.log_softmax(0)
    loss = (logp.exp().detach() * kl_estimate(logp, reference, "k2")).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], true_gradient)


def test_kl_and_entropy_enter_with_their_coefficients():
    one = batch([0.0, 0.0], weights=[0.5, 0.5], reference=[-1.0, -1.0])
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    entropy = torch.tensor([0.2, 0.4], dtype=torch.float64)
    config = SurrogateConfig(kl_coef=0.1, kl_estimator="k2", entropy_coef=0.01)
    loss = policy_loss(logprobs, dataclasses.replace(one, old_logprobs_N=logprobs), config, entropy_N=entropy).loss
    torch.testing.assert_close(loss, torch.tensor(0.1 * (0 + 0.5) / 2 - 0.01 * 0.3, dtype=torch.float64))


def test_importance_weights_truncate_and_mask():
    log_weights = torch.tensor([0.25, 1.0, 3.0], dtype=torch.float64).log()
    truncated = importance_weights(log_weights, SurrogateConfig(importance_correction="truncate", importance_cap=2.0))
    masked = importance_weights(log_weights, SurrogateConfig(importance_correction="mask", importance_cap=2.0))
    torch.testing.assert_close(truncated, torch.tensor([0.25, 1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(masked, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))


def test_correction_multiplies_the_surrogate_by_trainer_over_sampler():
    logs = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    one = batch([1.0, 1.0], weights=[0.5, 0.5], old=logs, sampler=logs - torch.tensor([1.5, 4.0]).double().log())
    config = SurrogateConfig(importance_correction="truncate", importance_cap=2.0)
    torch.testing.assert_close(policy_loss(logs, one, config).loss, torch.tensor(-(1.5 + 2.0) / 2, dtype=torch.float64))


@pytest.mark.parametrize(("key", "value"), [
    ("ratio", "word"), ("surrogate", "ppo"), ("aggregation", "mean"), ("kl_estimator", "k4"), ("clip_low", 1.0),
    ("dual_clip", 1.0), ("kl_coef", -0.1), ("importance_cap", 0.5),
])  # fmt: skip
def test_impossible_loss_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"loss.{key}={value}"):
        SurrogateConfig(**{key: value})
