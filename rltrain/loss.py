"""What all losses share: weights, KL, entropy, importance correction. Pure functions of a micro-batch.

The losses themselves are the files of :mod:`rltrain.losses`. Every per-token term is multiplied by ``batch.weights_N``,
which was set over the whole optimiser batch (see :mod:`rltrain.batching.collate`), so the losses of all micro-batches
and ranks add up to the loss of the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rltrain.losses.config import LossConfig
from rltrain.losses.ratios import old_logprobs, over_sequences
from rltrain.losses.terms import LossTerms
from rltrain.registry import part_of
from rltrain.types import LossOutput, Mean, Metrics, Sum, TokenBatch


def policy_loss(
    logprobs_N: Tensor, batch: TokenBatch, config: LossConfig, *, entropy_N: Tensor | None = None
) -> LossOutput:
    """``sum_n w_n · (correction_n · term_n + kl_coef · KL_n - entropy_coef · H_n)`` and its metrics.

    ``logprobs_N`` are the current policy's log-probs of ``batch.targets_N``; gradients flow through them (and through
    ``entropy_N`` when ``entropy_coef > 0``). ``term_n`` is the loss's own (:func:`loss_terms`).
    """
    terms = loss_terms(logprobs_N, batch, config)
    loss = _weighted(terms.loss_N, logprobs_N, batch, config, entropy_N).sum()
    return _output(loss, terms, logprobs_N, batch, config, entropy_N)


def token_losses(
    logprobs_N: Tensor, batch: TokenBatch, config: LossConfig, *, entropy_N: Tensor | None = None
) -> Tensor:
    """The terms of :func:`policy_loss`, weights included. Of some tokens alone, where the loss is separable."""
    return _weighted(loss_terms(logprobs_N, batch, config).loss_N, logprobs_N, batch, config, entropy_N)


def loss_output(
    loss: Tensor, logprobs_N: Tensor, batch: TokenBatch, config: LossConfig, *, entropy_N: Tensor | None
) -> LossOutput:
    """A loss that was made in pieces, with the metrics of the whole."""
    with torch.no_grad():
        terms = loss_terms(logprobs_N, batch, config)
    return _output(loss, terms, logprobs_N, batch, config, entropy_N)


def loss_terms(logprobs_N: Tensor, batch: TokenBatch, config: LossConfig) -> LossTerms:
    """The policy-gradient term of each token, from the loss that the config belongs to."""
    return part_of(config).function(logprobs_N, batch, config)


def _weighted(
    loss_N: Tensor, logprobs_N: Tensor, batch: TokenBatch, config: LossConfig, entropy_N: Tensor | None
) -> Tensor:
    if config.corrects_importance:
        loss_N = loss_N * importance_weights(log_importance(logprobs_N, batch, config), config)
    if config.kl_coef > 0:
        loss_N = loss_N + config.kl_coef * kl_estimate(logprobs_N, _reference(batch), config.kl_estimator)
    if config.entropy_coef > 0:
        assert entropy_N is not None, "loss.entropy_coef > 0 needs the entropy of the policy"
        loss_N = loss_N - config.entropy_coef * entropy_N
    return loss_N * batch.weights_N


def kl_estimate(logprobs_N: Tensor, reference_logprobs_N: Tensor, estimator: str) -> Tensor:
    """KL(pi || reference) per token from d = log ref - log pi: k1 = -d, k2 = d²/2, k3 = e^d - d - 1.

    Averaged over draws from pi, the gradient of k2 is that of KL(pi || ref), and the gradient of k3 that of
    KL(ref || pi): grad k3 = (1 - ref/pi)·grad log pi, whose mean is -sum_v ref_v·grad log pi_v.
    """
    difference_N = reference_logprobs_N - logprobs_N
    if estimator == "k1":
        return -difference_N
    if estimator == "k2":
        return difference_N.square() / 2
    return torch.expm1(difference_N) - difference_N


def log_importance(logprobs_N: Tensor, batch: TokenBatch, config: LossConfig) -> Tensor:
    """``log pi_old - log pi_sampler`` of each token; of its whole completion with ``sequence_truncate|mask``."""
    log_weight_N = old_logprobs(logprobs_N, batch) - batch.sampler_logprobs_N
    per_sequence = config.importance_correction.startswith("sequence_")
    return over_sequences(log_weight_N, batch) if per_sequence else log_weight_N


def importance_weights(log_weight_N: Tensor, config: LossConfig) -> Tensor:
    """Sampler-to-trainer correction w = pi_train / pi_sampler, without gradient.

    ``truncate``: min(w, C). ``mask``: w where 1/C <= w <= C, else 0. C is ``importance_cap``.
    """
    weight_N = log_weight_N.detach().exp()
    cap = config.importance_cap
    if config.importance_correction.endswith("truncate"):
        return weight_N.clamp(max=cap)
    return torch.where((weight_N >= 1 / cap) & (weight_N <= cap), weight_N, 0.0)


def _reference(batch: TokenBatch) -> Tensor:
    if batch.reference_logprobs_N is None:
        raise ValueError(
            "loss.kl_coef > 0 but the batch has no reference log-probs; give TokenBatch.reference_logprobs_N"
        )
    return batch.reference_logprobs_N


def _output(
    loss: Tensor, terms: LossTerms, logprobs_N: Tensor, batch: TokenBatch, config: LossConfig, entropy_N: Tensor | None
) -> LossOutput:
    metrics = _metrics(loss, terms, logprobs_N.detach(), batch, config, entropy_N)
    return LossOutput(loss=loss, metrics=metrics, logprobs_N=logprobs_N.detach())


@torch.no_grad()
def _metrics(
    loss: Tensor, terms: LossTerms, logprobs_N: Tensor, batch: TokenBatch, config: LossConfig, entropy_N: Tensor | None
) -> Metrics:
    """What the loss measures, entropy and KL over the tokens of non-zero weight."""
    real_N = batch.weights_N > 0
    metrics = {
        "loss": Sum(value=float(loss)),
        "policy_tokens": Sum(value=float(real_N.sum())),
        **{name: Mean.of(values_N[real_N]) for name, values_N in terms.metrics_N.items()},
    }
    if entropy_N is not None:
        metrics["entropy/trained"] = Mean.of(entropy_N[real_N])
    if batch.reference_logprobs_N is not None:
        metrics["kl"] = Mean.of(kl_estimate(logprobs_N, batch.reference_logprobs_N, config.kl_estimator)[real_N])
    return metrics
