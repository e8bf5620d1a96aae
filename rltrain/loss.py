"""The policy loss: ratios, clips, KL estimators, importance correction. Pure functions of a micro-batch.

Every per-token term is multiplied by ``batch.weights_N``, which was set over the whole optimiser batch (see
:mod:`rltrain.batching.collate`), so the losses of all micro-batches and ranks add up to the loss of the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rltrain.config import LossConfig
from rltrain.types import LossOutput, Mean, Metrics, Sum, TokenBatch


def policy_loss(
    logprobs_N: Tensor, batch: TokenBatch, config: LossConfig, *, entropy_N: Tensor | None = None
) -> LossOutput:
    """``sum_n w_n · (correction_n · surrogate_n + kl_coef · KL_n - entropy_coef · H_n)`` and its metrics.

    ``logprobs_N`` are the current policy's log-probs of ``batch.targets_N``; gradients flow through them (and through
    ``entropy_N`` when ``entropy_coef > 0``).
    """
    loss = token_losses(logprobs_N, batch, config, entropy_N=entropy_N).sum()
    return loss_output(loss, logprobs_N, batch, config, entropy_N=entropy_N)


def loss_output(
    loss: Tensor, logprobs_N: Tensor, batch: TokenBatch, config: LossConfig, *, entropy_N: Tensor | None
) -> LossOutput:
    """A loss with its metrics and the log-probs that it was computed from."""
    metrics = policy_metrics(loss, logprobs_N, batch, config, entropy_N=entropy_N)
    return LossOutput(loss=loss, metrics=metrics, logprobs_N=logprobs_N.detach())


def is_separable(config: LossConfig) -> bool:
    """Whether a token's loss depends on that token alone: not where a sequence's tokens share a ratio."""
    return config.ratio == "token"


def token_losses(
    logprobs_N: Tensor, batch: TokenBatch, config: LossConfig, *, entropy_N: Tensor | None = None
) -> Tensor:
    """The terms of :func:`policy_loss`, weights included."""
    log_ratio_N = log_ratios(logprobs_N, batch, config)
    loss_N = surrogate(logprobs_N, log_ratio_N, batch.advantages_N, config)
    if config.corrects_importance:
        loss_N = loss_N * importance_weights(old_logprobs(logprobs_N, batch) - batch.sampler_logprobs_N, config)
    if config.kl_coef > 0:
        loss_N = loss_N + config.kl_coef * kl_estimate(logprobs_N, _reference(batch), config.kl_estimator)
    if config.entropy_coef > 0:
        assert entropy_N is not None, "loss.entropy_coef > 0 needs the entropy of the policy"
        loss_N = loss_N - config.entropy_coef * entropy_N
    return loss_N * batch.weights_N


def old_logprobs(logprobs_N: Tensor, batch: TokenBatch) -> Tensor:
    """Log-probs of the policy before the update, which is the current one where the batch names no other."""
    return logprobs_N.detach() if batch.old_logprobs_N is None else batch.old_logprobs_N


def log_ratios(logprobs_N: Tensor, batch: TokenBatch, config: LossConfig) -> Tensor:
    """``log pi - log pi_old`` of each token; with ``ratio="sequence"`` the sequence's mean (GSPO, 2507.18071)."""
    log_ratio_N = logprobs_N - old_logprobs(logprobs_N, batch)
    if config.ratio == "token":
        return log_ratio_N
    sequences = len(batch.boundaries_S1) - 1
    totals_S = log_ratio_N.new_zeros(sequences).index_add(0, batch.sequence_N, log_ratio_N)
    counts_S = log_ratio_N.new_zeros(sequences).index_add(0, batch.sequence_N, torch.ones_like(log_ratio_N))
    return (totals_S / counts_S.clamp(min=1))[batch.sequence_N]


def surrogate(logprobs_N: Tensor, log_ratio_N: Tensor, advantages_N: Tensor, config: LossConfig) -> Tensor:
    """The per-token policy-gradient term, to be minimised.

    ``clip``: -min(rho·A, clip(rho, 1 - clip_low, 1 + clip_high)·A), and with ``dual_clip`` c for A < 0:
    -max(min(...), c·A). ``cispo`` (2506.13585): -sg(min(rho, 1 + clip_high))·A·log pi. ``reinforce``: -A·log pi.
    """
    if config.surrogate == "reinforce":
        return -advantages_N * logprobs_N
    ratio_N = log_ratio_N.exp()
    if config.surrogate == "cispo":
        return -ratio_N.detach().clamp(max=1 + config.clip_high) * advantages_N * logprobs_N
    clipped_N = ratio_N.clamp(1 - config.clip_low, 1 + config.clip_high)
    objective_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    if config.dual_clip is not None:
        floor_N = torch.where(advantages_N < 0, config.dual_clip * advantages_N, -torch.inf)
        objective_N = torch.maximum(objective_N, floor_N)
    return -objective_N


def kl_estimate(logprobs_N: Tensor, reference_logprobs_N: Tensor, estimator: str) -> Tensor:
    """KL(pi || reference) per token from d = log ref - log pi: k1 = -d, k2 = d²/2, k3 = e^d - d - 1."""
    difference_N = reference_logprobs_N - logprobs_N
    if estimator == "k1":
        return -difference_N
    if estimator == "k2":
        return difference_N.square() / 2
    return torch.expm1(difference_N) - difference_N


def importance_weights(log_weight_N: Tensor, config: LossConfig) -> Tensor:
    """Sampler-to-trainer correction w = pi_train / pi_sampler, without gradient.

    ``truncate``: min(w, C). ``mask``: w where 1/C <= w <= C, else 0. C is ``importance_cap``.
    """
    weight_N = log_weight_N.detach().exp()
    cap = config.importance_cap
    if config.importance_correction == "truncate":
        return weight_N.clamp(max=cap)
    return torch.where((weight_N >= 1 / cap) & (weight_N <= cap), weight_N, 0.0)


def _reference(batch: TokenBatch) -> Tensor:
    if batch.reference_logprobs_N is None:
        raise ValueError(
            "loss.kl_coef > 0 but the batch has no reference log-probs; give TokenBatch.reference_logprobs_N"
        )
    return batch.reference_logprobs_N


@torch.no_grad()
def policy_metrics(
    loss: Tensor, logprobs_N: Tensor, batch: TokenBatch, config: LossConfig, *, entropy_N: Tensor | None = None
) -> Metrics:
    """Clip shares, entropy and KL over the tokens of non-zero weight."""
    real_N = batch.weights_N > 0
    log_ratio_N = log_ratios(logprobs_N, batch, config)
    ratio_N, advantages_N = log_ratio_N[real_N].exp(), batch.advantages_N[real_N]
    low_N = (ratio_N < 1 - config.clip_low) & (advantages_N < 0)
    high_N = (ratio_N > 1 + config.clip_high) & (advantages_N > 0)
    metrics = {
        "loss": Sum(value=float(loss)),
        "clip_ratio/low_mean": Mean.of(low_N),
        "clip_ratio/high_mean": Mean.of(high_N),
        "clip_ratio/region_mean": Mean.of(low_N | high_N),
        "policy_tokens": Sum(value=float(real_N.sum())),
    }
    if entropy_N is not None:
        metrics["entropy"] = Mean.of(entropy_N[real_N])
    if batch.reference_logprobs_N is not None:
        metrics["kl"] = Mean.of(kl_estimate(logprobs_N, batch.reference_logprobs_N, config.kl_estimator)[real_N])
    return metrics
