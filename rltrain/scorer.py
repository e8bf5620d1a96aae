"""The scorer: log-probs of given spans under the policy, and under phi (``ScorerConfig``), for rewards that need them.

Always at temperature 1 and without gradient: a likelihood is a property of the model, not of the sampler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rltrain import dist
from rltrain.collate import empty_batch
from rltrain.config import ConfigError, RunConfig
from rltrain.logprobs import LogprobModel, inference, to_device
from rltrain.model import Policy, load_frozen, load_policy
from rltrain.packing import padded_bins
from rltrain.types import Mean, Metrics, SpanRequest, TokenBatch


def span_batch(requests: Sequence[SpanRequest]) -> TokenBatch:
    """The requests packed as one micro-batch whose loss tokens are those of the spans, in order."""
    lengths_S = torch.tensor([len(one.token_ids) for one in requests])
    boundaries_S1 = torch.cat([torch.zeros(1, dtype=torch.long), lengths_S.cumsum(0)])
    input_ids_L = torch.tensor([token for one in requests for token in one.token_ids])
    starts = boundaries_S1[:-1].tolist()
    wanted = [
        (sequence, start + position)
        for sequence, (start, one) in enumerate(zip(starts, requests, strict=True))
        for span in one.spans
        for position in range(*span)
    ]
    sequence_N, position_N = torch.tensor(wanted, dtype=torch.long).reshape(-1, 2).unbind(1)
    zero_N = torch.zeros(len(wanted))
    return TokenBatch(
        input_ids_L=input_ids_L,
        positions_L=torch.cat([torch.arange(length) for length in lengths_S.tolist()]),
        boundaries_S1=boundaries_S1,
        source_N=position_N - 1,  # the token at position t is predicted by the hidden state at t - 1
        sequence_N=sequence_N,
        targets_N=input_ids_L[position_N],
        weights_N=zero_N,
        advantages_N=zero_N,
        old_logprobs_N=zero_N,
        sampler_logprobs_N=zero_N,
    )


def span_logprobs(model: Any, requests: Sequence[SpanRequest], *, token_budget: int) -> list[list[Tensor]]:
    """Per request and span, the fp32 log-probs of its tokens, on the CPU; one forward pass per sequence.

    ``model`` is called as :class:`LogprobModel` is. All ranks call this together: each makes as many passes as the one
    with the most, so that a sharded model can gather its weights.
    """
    lengths = [len(one.token_ids) for one in requests]
    bins = padded_bins(lengths, max([token_budget, *lengths]))
    most = int(dist.all_max(torch.tensor(len(bins)), name="number of scoring batches"))
    results: list[list[Tensor]] = [[] for _ in requests]
    for indices in bins + [[]] * (most - len(bins)):
        batch = span_batch([requests[i] for i in indices]) if indices else empty_batch()
        logprobs_N = model(to_device(batch, dist.device()), entropy=False, temperature=1.0)[0].cpu()
        sizes = [stop - start for i in indices for start, stop in requests[i].spans]
        pieces = iter(logprobs_N.split(sizes) if indices else ())
        for i in indices:
            results[i] = [next(pieces) for _ in requests[i].spans]
    return results


class Scorer:
    """What ``Context.scorer`` is: ``policy(requests)`` and ``phi(requests)``, each a list of log-probs per span.

    ``policy`` is the module or engine that is trained. An EMA follows it by :meth:`follow`; its shadow is whole and
    fp32 on every rank, and its state is :meth:`tensors`.
    """

    def __init__(self, policy: Any, phi: Any, *, token_budget: int, decay: float | None = None) -> None:
        self._policy, self._phi = policy, phi
        self._token_budget, self._decay = token_budget, decay

    def policy(self, requests: Sequence[SpanRequest]) -> list[list[Tensor]]:
        """Log-probs under the policy as it is now."""
        return self._score(self._policy, requests)

    def phi(self, requests: Sequence[SpanRequest]) -> list[list[Tensor]]:
        """Log-probs under phi."""
        return self._score(self._phi, requests)

    def _score(self, model: Any, requests: Sequence[SpanRequest]) -> list[list[Tensor]]:
        with inference(getattr(model, "module", model)):
            return span_logprobs(model, requests, token_budget=self._token_budget)

    @torch.no_grad()
    def start(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """``phi <- theta``, or a saved phi, if phi is an EMA."""
        if self._decay is not None:
            shadow = self.tensors()
            for name, theta in parameters:
                shadow[name].copy_(theta)

    @torch.no_grad()
    def follow(self, parameters: Iterable[tuple[str, Tensor]]) -> Metrics:
        """``phi <- decay·phi + (1 - decay)·theta`` if phi is an EMA; the metric is ||theta - phi|| / ||theta||."""
        if self._decay is None:
            return {}
        shadow, gap, size = self.tensors(), 0.0, 0.0
        for name, theta in parameters:
            shadow[name].lerp_(theta.float(), 1 - self._decay)
            gap += float((theta.float() - shadow[name]).square().sum())
            size += float(theta.float().square().sum())
        return {"scorer/ema_distance": Mean.of((gap / size) ** 0.5)}

    def tensors(self) -> dict[str, Tensor]:
        """The EMA's trainable parameters by name, as they are, not copies; empty if phi is no EMA."""
        if self._decay is None:
            return {}
        return {name: parameter.detach() for name, parameter in self._phi.named_parameters() if parameter.requires_grad}


def load_scorer(
    config: RunConfig, policy: Policy, module: Any, *, initial: str | None = None, reference: Any = None
) -> Scorer:
    """The scorer of a run, an EMA not yet started.

    ``module`` is the engine, or the :class:`LogprobModel`, that holds the policy; ``initial`` is where the policy's
    first weights are. Phi shares the ``reference`` model where it may.
    """
    kind, budget = config.scorer.kind, config.batch.token_budget
    if kind == "policy":
        return Scorer(module, module, token_budget=budget)
    if kind == "ema":
        return Scorer(module, load_shadow(config, initial), token_budget=budget, decay=config.scorer.decay)
    if reference is not None and config.scorer.path == config.reference:
        return Scorer(module, reference, token_budget=budget)
    frozen = load_frozen(config.model, path=config.scorer.path or initial)
    check_same_vocabulary(policy, frozen, path=config.scorer.path)
    return Scorer(module, LogprobModel(frozen.model, temperature=1.0).to(dist.device()), token_budget=budget)


def load_shadow(config: RunConfig, initial: str | None) -> nn.Module:
    """A second policy in fp32, adapters included."""
    plain = dataclasses.replace(config.model, gradient_checkpointing=False)
    shadow = LogprobModel(load_policy(plain, path=initial).model.float(), temperature=1.0)
    return shadow.to(dist.device()).eval()


def check_same_vocabulary(policy: Policy, frozen: Policy, *, path: str | None) -> None:
    """Refuse a scorer to which the policy's token ids mean something else."""
    ours, theirs = policy.tokenizer.get_vocab(), frozen.tokenizer.get_vocab()
    rows = frozen.model.get_input_embeddings().num_embeddings
    if ours != theirs or rows < len(ours):
        raise ConfigError(
            f"scorer.path={path}: its vocabulary ({len(theirs)} tokens, {rows} embeddings) is not the policy's "
            f"({len(ours)} tokens); choose a model that shares the policy's tokenizer"
        )
