"""The scorer: log-probs of given spans under the policy, and under phi (``ScorerConfig``), for rewards that need them.

Always at temperature 1 and without gradient: a likelihood is a property of the model, not of the sampler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rltrain.batching.bins import Layout
from rltrain.batching.collate import NO_WEIGHTING, LossRow, arrange, bins_of, empty_batch, token_batch, unit_segments
from rltrain.config import RunConfig
from rltrain.engine.deepspeed import shard_frozen, sharded_loading
from rltrain.errors import ConfigError, RunError
from rltrain.policy.capabilities import most_positions
from rltrain.policy.layout_check import usable_layouts
from rltrain.policy.load import Policy, load_frozen, load_policy
from rltrain.policy.logprobs import LogprobModel, inference, logprobs, loss_tokens, to_device, unwrapped
from rltrain.policy.model_check import check_units, difference, limit, own_logprobs, quiet
from rltrain.runtime import dist
from rltrain.types import Mean, Metrics, Need, SpanRequest, TokenBatch


def span_row(request: SpanRequest) -> LossRow:
    """The request as a completion of its prompt, with advantages of 0."""
    completion_ids = request.token_ids[request.prompt_tokens :]
    return LossRow(
        prompt_ids=request.token_ids[: request.prompt_tokens],
        completion_ids=completion_ids,
        sampler_logprobs=(0.0,) * len(completion_ids),
        advantages_T=torch.zeros(len(completion_ids)),
    )


def span_token_indices(requests: Sequence[SpanRequest]) -> Tensor:
    """The indices of the spans' tokens among the loss tokens of all completions, span by span."""
    indices, first = [], 0
    for request in requests:
        before = first - request.prompt_tokens
        for start, stop in request.spans:
            indices += range(before + start, before + stop)
        first = before + len(request.token_ids)
    return torch.tensor(indices, dtype=torch.long)


def span_batches(
    requests: Sequence[SpanRequest], layouts: Sequence[Layout], *, token_budget: int, hidden_size: int
) -> list[tuple[list[int], TokenBatch]]:
    """Micro-batches whose loss tokens are those of the spans, and the requests in each. All ranks get as many."""
    longest_here = max([0, *(len(request.token_ids) for request in requests)])
    longest = dist.all_max(torch.tensor(longest_here), name="longest to score")
    budget, rows = max(token_budget, int(longest)), [span_row(request) for request in requests]
    layout, arranged = arrange(rows, layouts, token_budget=budget, hidden_size=hidden_size)
    units = [tuple(rows[i] for i in indices) for indices in arranged]
    batches = []
    for unit_indices in bins_of([unit_segments(unit) for unit in units], layout, budget):
        order = [i for unit in unit_indices for i in arranged[unit]]
        whole = token_batch([units[unit] for unit in unit_indices], NO_WEIGHTING, layout)
        batches.append((order, loss_tokens(whole, span_token_indices([requests[i] for i in order]))))
    most = int(dist.all_max(torch.tensor(len(batches)), name="number of scoring batches"))
    return batches + [([], empty_batch()) for _ in range(most - len(batches))]


def span_logprobs(model: Any, batch: TokenBatch) -> Tensor:
    """The log-probs of the loss tokens at temperature 1."""
    return logprobs(model, batch, entropy=False, temperature=1.0).logprobs_N


def span_entropies(model: Any, batch: TokenBatch) -> Tensor:
    """The entropies of the policy at the loss tokens, at temperature 1, in nats."""
    entropy_N = logprobs(model, batch, temperature=1.0).entropy_N
    assert entropy_N is not None
    return entropy_N


def span_values(
    model: Any,
    requests: Sequence[SpanRequest],
    *,
    token_budget: int,
    layouts: Sequence[Layout] = ("padded",),
    values: Callable[[Any, TokenBatch], Tensor] = span_logprobs,
) -> list[list[Tensor]]:
    """Per request and span, the fp32 log-probs of its tokens, on the CPU, or other ``values`` of the loss tokens.

    ``model`` is called as :class:`LogprobModel` is. Of the ``layouts`` the one of the least work is taken. The budget
    is raised to the longest sequence. All ranks call this together and make the same number of passes, so that
    a sharded model can gather its weights.
    """
    hidden_size = unwrapped(model).model.config.get_text_config().hidden_size
    results: list[list[Tensor]] = [[] for _ in requests]
    for order, batch in span_batches(requests, layouts, token_budget=token_budget, hidden_size=hidden_size):
        batch = to_device(batch, dist.device())
        values_N = values(model, batch)
        sizes = [stop - start for i in order for start, stop in requests[i].spans]
        pieces = iter(values_N.cpu().split(sizes) if order else ())
        for i in order:
            results[i] = [next(pieces) for _ in requests[i].spans]
    return results


def _request(row: LossRow) -> SpanRequest:
    """The completion of a row as one span."""
    ids, prompt = row.prompt_ids + row.completion_ids, len(row.prompt_ids)
    return SpanRequest(token_ids=ids, spans=((prompt, len(ids)),), prompt_tokens=prompt)


def _flat(results: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.cat([span for spans in results for span in spans]).to(dist.device())


class Scorer:
    """The service ``Context.scorer``: ``policy(requests)`` and ``phi(requests)`` give log-probs by request and span.

    ``policy`` is the module or engine that is trained. An EMA follows it by :meth:`follow`. Its shadow is whole and
    fp32 on every rank, and its state is :meth:`tensors`.
    """

    def __init__(
        self,
        policy: Any,
        phi: Any,
        *,
        token_budget: int,
        decay: float | None = None,
        layouts: Sequence[Layout] = ("padded",),
        reference: Any = None,
    ) -> None:
        self._policy, self._phi, self._reference = policy, phi, reference
        self._token_budget, self._decay, self._layouts = token_budget, decay, layouts

    def policy(self, requests: Sequence[SpanRequest]) -> list[list[Tensor]]:
        """Log-probs under the policy as it is now."""
        return self._score(self._policy, requests)

    def entropies(self, requests: Sequence[SpanRequest]) -> list[list[Tensor]]:
        """Entropies of the policy's distribution over each token of the spans, in nats."""
        return self._score(self._policy, requests, span_entropies)

    def phi(self, requests: Sequence[SpanRequest]) -> list[list[Tensor]]:
        """Log-probs under phi."""
        return self._score(self._phi, requests)

    def reference(self, requests: Sequence[SpanRequest]) -> list[list[Tensor]]:
        """Log-probs under the initial policy; RunError where no part declared that it needs them."""
        if self._reference is None:
            raise RunError(
                "context.scorer.reference: nothing declared this service; register the part with "
                "needs={Need.SCORER, Need.REFERENCE_LOGPROBS}"
            )
        return self._score(self._reference, requests)

    def _score(
        self, model: Any, requests: Sequence[SpanRequest], values: Callable[[Any, TokenBatch], Tensor] = span_logprobs
    ) -> list[list[Tensor]]:
        self._refuse_too_long(unwrapped(model).model, requests)
        with inference(unwrapped(model)):
            return span_values(model, requests, token_budget=self._token_budget, layouts=self._layouts, values=values)

    @staticmethod
    def _refuse_too_long(model: Any, requests: Sequence[SpanRequest]) -> None:
        positions = most_positions(model.config.get_text_config())
        longest = max([0, *(len(request.token_ids) for request in requests)])
        if positions is not None and longest > positions:
            raise RunError(
                f"scorer: a sequence of {longest} tokens is to be scored by a model of {positions} positions; shorten "
                "the completions (sampling.max_new_tokens) or what the estimator or reward puts before them"
            )

    def check(self) -> None:
        """Compare the log-probs of its models with an independent forward of theirs; ConfigError if they differ."""
        models = {"policy": self._policy, "phi": self._phi, "reference": self._reference}
        models = {name: model for name, model in models.items() if model is not None}
        for name, model in models.items():
            own_model = unwrapped(model).model
            units = check_units(own_model)
            requests = [_request(row) for unit in units for row in unit]
            with quiet(own_model):
                own_N = own_logprobs(own_model, units)
                score = partial(self._score, model, requests)
                apart = difference(lambda score=score: _flat(score()), own_N, limit(own_model, own_N))
            if not apart.fits:
                raise ConfigError(
                    f"scorer: log-probs of {type(own_model).__name__} ({name}) are {apart}; this architecture cannot "
                    "score here, choose another"
                )

    @torch.no_grad()
    def start(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """``phi <- theta``, or a saved phi, if phi is an EMA."""
        if self._decay is not None:
            shadow = self.tensors()
            for name, theta in parameters:
                shadow[name].copy_(theta)

    @torch.no_grad()
    def follow(self, parameters: Iterable[tuple[str, Tensor]]) -> Metrics:
        """``phi <- decay·phi + (1 - decay)·theta`` if phi is an EMA. The metric is ||theta - phi|| / ||theta||."""
        if self._decay is None:
            return {}
        shadow, gap, size = self.tensors(), 0.0, 0.0
        for name, theta in parameters:
            shadow[name].lerp_(theta.float(), 1 - self._decay)
            gap += float((theta.float() - shadow[name]).square().sum())
            size += float(theta.float().square().sum())
        return {"scorer/ema_distance": Mean.of((gap / size) ** 0.5)}

    def tensors(self) -> dict[str, Tensor]:
        """The EMA's trainable parameters by name, not copied. Empty if phi is no EMA."""
        if self._decay is None:
            return {}
        return {name: parameter.detach() for name, parameter in self._phi.named_parameters() if parameter.requires_grad}


def load_scorer(
    config: RunConfig,
    policy: Policy,
    module: Any,
    *,
    initial: str | None = None,
    reference: Any = None,
    trained: str | None = None,
) -> Scorer:
    """The scorer of a run, an EMA not yet started.

    ``module`` is the engine, or the :class:`LogprobModel`, that holds the policy. ``initial`` is where the policy's
    first weights are, ``trained`` those of a phi that the run trained. Phi is the ``reference`` model if both have the
    same weights.
    """
    phi, decay = module, None
    if config.scorer.kind == "ema":
        phi, decay = load_shadow(config, initial), config.scorer.decay
    elif config.scorer.kind == "frozen":
        chosen = config.scorer.path or trained
        shared = reference is not None and chosen == config.reference
        phi = reference if shared else load_phi(config, policy, path=chosen or initial)
    models = {id(model): model for model in (module, phi, reference) if model is not None}
    layouts = usable_layouts(config.batch.packing, list(models.values()))
    scorer = Scorer(
        module, phi, token_budget=config.batch.token_budget, decay=decay, layouts=layouts, reference=reference
    )
    scorer.check()
    return scorer


def load_phi(config: RunConfig, policy: Policy, *, path: str | None) -> LogprobModel:
    """A frozen model that shares the policy's vocabulary."""
    frozen = load_frozen(config.model, path=path, device=dist.device())
    check_same_vocabulary(policy, frozen, name=f"scorer.path={config.scorer.path}")
    return LogprobModel(frozen.model, temperature=1.0).to(dist.device())


def load_shadow(config: RunConfig, initial: str | None) -> nn.Module:
    """A second policy in fp32, adapters included."""
    plain = dataclasses.replace(config.model, gradient_checkpointing=False)
    policy = load_policy(plain, path=initial, device=dist.device())
    shadow = LogprobModel(policy.model.float(), temperature=1.0)
    return shadow.to(dist.device()).eval()


def check_same_vocabulary(policy: Policy, frozen: Policy, *, name: str) -> None:
    """ConfigError for a scorer or teacher whose vocabulary differs from the policy's; ``name`` is its setting."""
    ours, theirs = policy.tokenizer.get_vocab(), frozen.tokenizer.get_vocab()
    rows = frozen.model.get_input_embeddings().num_embeddings
    if ours != theirs or rows < len(ours):
        raise ConfigError(
            f"{name}: its vocabulary ({len(theirs)} tokens, {rows} embeddings) is not the policy's "
            f"({len(ours)} tokens); choose a model that shares the policy's tokenizer"
        )


def load_reference(config: RunConfig, *, path: str | None) -> LogprobModel | None:
    """The initial policy (or ``reference``), frozen, where the loss or a part needs it."""
    if Need.REFERENCE_LOGPROBS not in config.needs():
        return None
    with sharded_loading(config.deepspeed, dtype=config.model.dtype):
        model = load_frozen(config.model, path=path, device=dist.device()).model
    reference = LogprobModel(model, temperature=config.sampling.temperature)
    return shard_frozen(reference, config.deepspeed, dtype=config.model.dtype)
