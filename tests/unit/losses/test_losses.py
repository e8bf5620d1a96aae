"""Every loss by hand, against a plain loop, and in pieces."""

import dataclasses
import hashlib
import math

import pytest
import torch
from loss_batches import batch

from rltrain import cli
from rltrain.errors import ConfigError
from rltrain.loss import importance_weights, kl_estimate, log_importance, loss_terms, policy_loss, token_losses
from rltrain.losses.clip_cov import ClipCovConfig
from rltrain.losses.dppo_tv import DppoTvConfig
from rltrain.losses.fipo import FipoConfig, discounted_future
from rltrain.losses.kl_cov import KlCovConfig
from rltrain.losses.surrogate import SurrogateConfig
from rltrain.policy.logprobs import loss_tokens


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def logs(values):
    return double(values).log()


def terms(logprobs, one, config):
    """Each token's term and its derivative by its own log-prob."""
    leaf = logprobs.clone().requires_grad_()
    found = loss_terms(leaf, one, config)
    (gradient,) = torch.autograd.grad(found.loss_N.sum(), leaf)
    return found.loss_N.detach(), gradient, found.metrics_N


def test_dppo_tv_by_hand():
    """pi_old 0.5 each but the last. Moved +0.25 (A > 0) and -0.25 (A < 0): masked. The other two: weight pi/pi_old.

    The last goes from 0.001 to 0.1: it moved by less than 0.2, and its ratio 100 is capped at 20.
    """
    one = batch([1.0, -1.0, 1.0, -1.0, 2.0], old=logs([0.5, 0.5, 0.5, 0.5, 0.001]))
    _, gradient, metrics = terms(logs([0.75, 0.25, 0.25, 0.75, 0.1]), one, DppoTvConfig())
    torch.testing.assert_close(gradient, double([0.0, 0.0, -0.5, 1.5, -40.0]))
    assert metrics["clip_ratio/high_mean"].tolist() == [True, False, False, False, False]
    assert metrics["clip_ratio/low_mean"].tolist() == [False, True, False, False, False]


def test_fipo_by_hand():
    """Half-life 1, log ratios (.1, .2, -.1) and (.05): futures (.1 + .2/2 - .1/4, .2 - .1/2, -.1, .05)."""
    one, log_ratio = batch([1.0] * 4, lengths=[3, 1]), double([0.1, 0.2, -0.1, 0.05])
    future = discounted_future(log_ratio, one.sequence_N, half_life_tokens=1.0)
    torch.testing.assert_close(future, double([0.175, 0.15, -0.1, 0.05]))
    loss, _, metrics = terms(log_ratio, one, FipoConfig(half_life_tokens=1.0, clip_high=0.2))
    weights = [math.exp(0.175), math.exp(0.15), 1.0, math.exp(0.05)]
    ratios = [math.exp(0.1), 1.2, math.exp(-0.1), math.exp(0.05)]  # e^0.2 = 1.22 is clipped
    torch.testing.assert_close(metrics["fipo/weight"], double(weights))
    torch.testing.assert_close(loss, double([-w * r for w, r in zip(weights, ratios, strict=True)]))


def test_the_future_of_long_sequences_is_the_plain_sum():
    lengths, half_life = [1, 37, 5], 4.0
    values = torch.randn(sum(lengths), dtype=torch.float64)
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    rows = values.split(lengths)
    slow = [
        sum(2 ** (-(k - t) / half_life) * row[k] for k in range(t, len(row))) for row in rows for t in range(len(row))
    ]
    torch.testing.assert_close(discounted_future(values, sequence, half_life_tokens=half_life), torch.stack(slow))


COV = {"advantages": [-1.0, 2.0, 0.0, -1.0], "old": [-3.0, -1.0, -2.0, -2.0]}
"""Means 0 and -2: covariances (-1)(-1) = 1, (2)(1) = 2, 0, (-1)(0) = 0."""


def test_kl_cov_by_hand():
    """A quarter of four tokens: the one of covariance 2. It pays |0.1| more, whose derivative is 1."""
    config = KlCovConfig(share=0.25)
    (one,) = config.marked([batch(COV["advantages"], old=COV["old"])], "0/0/0")
    assert one.selected_N.tolist() == [False, True, False, False]
    loss, gradient, metrics = terms(double(COV["old"]) + 0.1, one, config)
    rho = math.exp(0.1)
    torch.testing.assert_close(loss, double([rho, -2 * rho + 0.1, 0.0, rho]))
    torch.testing.assert_close(gradient, double([rho, -2 * rho + 1.0, 0.0, rho]))
    assert metrics["loss/selected"].tolist() == [False, True, False, False]


def test_kl_cov_does_nothing_at_ratio_one():
    config = KlCovConfig(share=0.25)
    (one,) = config.marked([batch(COV["advantages"], old=COV["old"])], "0/0/0")
    _, gradient, _ = terms(double(COV["old"]), one, config)
    torch.testing.assert_close(gradient, -double(COV["advantages"]))


def test_clip_cov_by_hand():
    """Two candidates have 0.5 < covariance < 5. One token is drawn: the one of the smaller hash of name and key."""
    config = ClipCovConfig(share=0.25, cov_low=0.5)
    (one,) = config.marked([batch(COV["advantages"], old=COV["old"], keys=[7, -8, 9, 10])], "3/5/1")
    hashes = [
        int.from_bytes(hashlib.blake2b(f"3/5/1/{key}".encode(), digest_size=8).digest(), "little") for key in (7, -8)
    ]
    drawn = hashes.index(min(hashes))
    assert one.selected_N.nonzero().flatten().tolist() == [drawn]
    _, gradient, _ = terms(double(COV["old"]), one, config)
    expected = -double(COV["advantages"])
    expected[drawn] = 0.0
    torch.testing.assert_close(gradient, expected)


def test_without_candidates_nothing_is_selected():
    (one,) = ClipCovConfig().marked([batch([0.5, 0.5], old=[-1.0, -2.0])], "0/0/0")
    assert one.selected_N.tolist() == [False, False]


def test_draws_differ_between_minibatches():
    config, one = ClipCovConfig(share=0.1, cov_low=0.0, cov_high=9.0), random_batch([40, 60], seed=3)
    chosen = {
        tuple(config.marked([one], f"0/{step}/0")[0].selected_N.nonzero().flatten().tolist()) for step in range(9)
    }
    assert len(chosen) == 9


def test_importance_of_a_completion_by_hand():
    """Token weights (1.5, 2) and (1/4): 3 and 1/4. C = 2 truncates to 2 and 1/4 and masks both; C = 4 masks none."""
    old = logs([0.3, 0.4, 0.05])
    one = batch([1.0] * 3, old=old, sampler=logs([0.2, 0.2, 0.2]), lengths=[2, 1])
    expected = {
        ("sequence_truncate", 2.0): [2.0, 2.0, 0.25], ("sequence_mask", 2.0): [0.0, 0.0, 0.0],
        ("sequence_mask", 4.0): [3.0, 3.0, 0.25], ("truncate", 2.0): [1.5, 2.0, 0.25], ("mask", 3.0): [1.5, 2.0, 0.0],
    }  # fmt: skip
    for (correction, cap), weights in expected.items():
        config = SurrogateConfig(importance_correction=correction, importance_cap=cap)
        found = importance_weights(log_importance(old, one, config), config)
        torch.testing.assert_close(found, double(weights))
        loss = policy_loss(old, one, config).loss  # at ratio 1 the term is -1, and each token weighs 1/3
        torch.testing.assert_close(loss, -double(weights).mean())


def random_batch(lengths, *, seed=0):
    generator, count = torch.Generator().manual_seed(seed), sum(lengths)
    draw = lambda: torch.randn(count, generator=generator, dtype=torch.float64)  # noqa: E731
    old = -2.0 * draw().abs()
    advantages = draw()
    return batch(
        advantages.tolist(), old=old, sampler=old + 0.2 * draw(), lengths=lengths, keys=torch.arange(count) * 17
    )


def clip_term(rho, advantage, config):
    clipped = min(max(rho, 1 - config.clip_low), 1 + config.clip_high)
    return -min(rho * advantage, clipped * advantage)


def slow_clip_cov(log_ratio, place, row, one, config):
    n = row[place]
    return 0.0 * log_ratio[n] if one.selected_N[n] else clip_term(log_ratio[n].exp(), one.advantages_N[n], config)


def slow_kl_cov(log_ratio, place, row, one, config):
    n = row[place]
    penalty = abs(log_ratio[n]) if one.selected_N[n] else 0.0
    return -log_ratio[n].exp() * one.advantages_N[n] + config.penalty * penalty


def slow_dppo_tv(log_ratio, place, row, one, config):
    n = row[place]
    old, advantage = one.old_logprobs_N[n], one.advantages_N[n]
    logprob = log_ratio[n] + old
    moved = float(logprob.detach().exp() - old.exp())
    masked = moved > config.tv_high if advantage > 0 else moved < -config.tv_low
    return 0.0 * logprob if masked else -log_ratio[n].detach().exp() * advantage * logprob  # no ratio exceeds the cap


def slow_fipo(log_ratio, place, row, one, config):
    ahead = sum(
        2 ** (-(k - place) / config.half_life_tokens) * float(log_ratio[row[k]].detach())
        for k in range(place, len(row))
    )
    weight = min(max(math.exp(ahead), config.weight_low), config.weight_high)
    return weight * clip_term(log_ratio[row[place]].exp(), one.advantages_N[row[place]], config)


SLOW = {
    "clip_cov": (ClipCovConfig(share=0.1, cov_low=0.1), slow_clip_cov),
    "kl_cov": (KlCovConfig(share=0.1), slow_kl_cov),
    "dppo_tv": (DppoTvConfig(tv_low=0.05, tv_high=0.05), slow_dppo_tv),
    "fipo": (FipoConfig(half_life_tokens=3.0), slow_fipo),
}
LENGTHS = [5, 1, 8, 6]


@pytest.mark.parametrize("correction", ["none", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("name", SLOW)
def test_value_and_gradient_equal_a_plain_loop(name, correction):
    config, slow = SLOW[name]
    config = dataclasses.replace(config, importance_correction=correction, importance_cap=1.2)
    (one,) = config.marked([random_batch(LENGTHS)], "0/0/0")
    logprobs = (one.old_logprobs_N + 0.3 * random_batch(LENGTHS, seed=1).advantages_N).requires_grad_()
    loss = policy_loss(logprobs, one, config).loss
    (gradient,) = torch.autograd.grad(loss, logprobs)
    log_ratio, places, total = logprobs - one.old_logprobs_N, torch.arange(sum(LENGTHS)).split(LENGTHS), 0.0
    for row in places:
        weight = math.exp(float((one.old_logprobs_N - one.sampler_logprobs_N)[row].sum()))
        weight = {
            "none": 1.0,
            "sequence_truncate": min(weight, 1.2),
            "sequence_mask": weight if 1 / 1.2 <= weight <= 1.2 else 0.0,
        }[correction]
        for place, n in enumerate(row):
            total = total + weight * one.weights_N[n] * slow(log_ratio, place, row, one, config)
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(gradient, torch.autograd.grad(total, logprobs)[0])
    assert config.separable == (correction == "none" and name != "fipo")


def rows_alone(one, lengths):
    """Each sequence of a micro-batch as a micro-batch of its own."""
    alone = []
    for rows, tokens in zip(torch.arange(sum(lengths)).split(lengths), lengths, strict=True):
        empty = torch.zeros(tokens + 1, dtype=torch.long)
        some = dataclasses.replace(
            loss_tokens(one, rows), input_ids_L=empty, positions_L=empty, boundaries_S1=torch.tensor([0, tokens + 1])
        )
        alone.append(dataclasses.replace(some, sequence_N=torch.zeros(tokens, dtype=torch.long)))
    return alone


@pytest.mark.parametrize("name", SLOW)
def test_micro_batches_add_up(name):
    config = dataclasses.replace(SLOW[name][0], importance_correction="sequence_truncate", importance_cap=1.2)
    whole = random_batch(LENGTHS)
    parts = config.marked(rows_alone(whole, LENGTHS), "0/0/0")
    (whole,) = config.marked([whole], "0/0/0")
    logprobs = (whole.old_logprobs_N + 0.3 * random_batch(LENGTHS, seed=1).advantages_N).requires_grad_()
    together = policy_loss(logprobs, whole, config)
    apart = [policy_loss(p, part, config) for p, part in zip(logprobs.split(LENGTHS), parts, strict=True)]
    torch.testing.assert_close(sum(output.loss for output in apart), together.loss)
    torch.testing.assert_close(
        torch.autograd.grad(sum(output.loss for output in apart), logprobs)[0],
        torch.autograd.grad(together.loss, logprobs)[0],
    )
    for metric, value in together.metrics.items():
        summed = [output.metrics[metric] for output in apart]
        total = summed[0] + summed[1] + summed[2] + summed[3]
        assert vars(total) == pytest.approx(vars(value)), metric


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov", "dppo_tv"])
def test_a_separable_loss_may_be_made_in_pieces(name):
    """What the fused head relies on: slices of tokens, wherever they are cut."""
    config = SLOW[name][0]
    (one,) = config.marked([random_batch(LENGTHS)], "0/0/0")
    logprobs = one.old_logprobs_N + 0.3
    pieces = [token_losses(logprobs[rows], loss_tokens(one, rows), config) for rows in (slice(0, 7), slice(7, 20))]
    torch.testing.assert_close(torch.cat(pieces).sum(), policy_loss(logprobs, one, config).loss)


def test_the_gradient_of_k3_is_that_of_the_forward_divergence():
    """Over the whole distribution: sum_v pi_v·grad k3_v = grad KL(ref || pi), which is not grad KL(pi || ref)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    gradients = {}
    for name in ("k1", "k2", "k3"):
        loss = (logp.exp().detach() * kl_estimate(logp, reference, name)).sum()
        (gradients[name],) = torch.autograd.grad(loss, logits, retain_graph=True)
    (forward,) = torch.autograd.grad((reference.exp() * (reference - logp)).sum(), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), logits)
    torch.testing.assert_close(gradients["k3"], forward)
    torch.testing.assert_close(gradients["k2"], reverse)
    torch.testing.assert_close(gradients["k1"], torch.zeros(7, dtype=torch.float64))
    assert float((forward - reverse).abs().max()) > 0.05


@pytest.mark.parametrize(("overrides", "message"), [
    (["algorithm=clip_cov", "loss.ratio=sequence"], "loss.ratio: no such key; it belongs to loss=surrogate, which"),
    (["algorithm=dapo", "loss=kl_cov"], "loss.clip_low: no such key; it belongs to loss=clip_cov or"),
    (["algorithm=fipo", "loss.weight_high=0.5"], "loss.weight_high=0.5: must be >= 1"),
    (["algorithm=dppo_tv", "loss.tv_low=2"], "loss.tv_low=2.0: must lie in [0, 1]"),
    (["algorithm=clip_cov", "loss.cov_low=7"], "loss.cov_low=7.0: must be below loss.cov_high=5.0"),
    (["loss=custom", "loss.import_path=losses:none"], "loss.import_path=losses:none: no module named losses"),
])  # fmt: skip
def test_what_is_undefined_is_one_line(overrides, message):
    with pytest.raises(Exception) as caught:
        cli.compose(overrides)
    line = str(caught.value) if isinstance(caught.value, ConfigError) else cli.one_line(caught.value)
    assert message in line
