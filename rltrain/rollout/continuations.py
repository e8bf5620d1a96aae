"""Completions continued from inside: what is asked of an engine, and the local engine's caches forked.

A completion is forwarded once, however many of its states are asked: the cache of a state is a piece of the cache of
the longest prefix that begins with it. Equal prefixes are one state, also those of different completions.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rltrain.config import RunConfig, SamplingConfig
from rltrain.errors import RunError
from rltrain.policy.head import own_logits
from rltrain.rollout.continuation_types import ContinuationRequest, Continuing
from rltrain.rollout.sampling import row_key
from rltrain.rollout.shared_prompt_decoder import Prefilled, SharedDecoder
from rltrain.rollout.stopping import StopRule
from rltrain.runs.metrics import Accumulator
from rltrain.runtime import dist, watchdog
from rltrain.types import Completion, Need, Prober, RolloutServices, Sum

Ids = tuple[int, ...]

# The logits of so many states exist at once, at most, besides those of a single prefix.
_STATES_PER_PASS = 512


def draw_key(seed: int, step: int, request: ContinuationRequest, draw: int) -> int:
    """The 64-bit signed key of one continuation (:func:`~rltrain.rollout.sampling.row_key`)."""
    name = f"continuation/{request.position}/{draw}/{request.problem_id}"
    return row_key(seed, step, name, request.sample_index, request.occurrence)


def rule_of(request: ContinuationRequest, rule: StopRule) -> StopRule:
    """Where the continuations of a request end; ``rule`` is that of whole completions."""
    if request.one_turn is not None:
        return request.one_turn.rule
    return rule.after(request.completion_ids, max_new_tokens=request.max_new_tokens)


def sampling_of(request: ContinuationRequest, sampling: SamplingConfig) -> SamplingConfig:
    """The run's sampling, or the request's in its place."""
    wanted = request.sampling
    if wanted is None:
        return sampling
    return replace(sampling, temperature=wanted.temperature, top_p=wanted.top_p, top_k=wanted.top_k)


def check_requests(requests: Sequence[ContinuationRequest], sampling: SamplingConfig, rule: StopRule) -> None:
    """``RunError`` for a state that lies behind a completion's end, or whose continuation could be longer than any."""
    longest = sampling.max_prompt_tokens + sampling.max_new_tokens
    for request in requests:
        name = f"continuation of problem {request.problem_id}, sample {request.sample_index}"
        tokens = len(request.prefix_ids) + request.max_new_tokens
        if tokens > longest:
            raise RunError(
                f"{name}: a prefix of {len(request.prefix_ids)} tokens and max_new_tokens={request.max_new_tokens} "
                f"exceed sampling.max_prompt_tokens + max_new_tokens = {longest}; lower the request's max_new_tokens"
            )
        if request.one_turn is None and not request.turns and set(rule.stop_ids) & set(request.completion_ids):
            raise RunError(f"{name}: its {request.position} ids hold a stop id; ask for states before the end")


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A prefix that begins no other, with the lengths of the states inside it, its own included."""

    ids: Ids
    lengths: tuple[int, ...]


def leaves(prefixes: Iterable[Ids]) -> list[Leaf]:
    """Every distinct prefix as a state of the longest one that begins with it; shortest leaves first."""
    found: list[tuple[Ids, list[int]]] = []
    for ids in sorted(set(prefixes), reverse=True):
        # In this order all that ids begins comes right before it.
        if found and found[-1][0][: len(ids)] == ids:
            found[-1][1].append(len(ids))
        else:
            found.append((ids, [len(ids)]))
    return sorted((Leaf(ids=ids, lengths=tuple(lengths[::-1])) for ids, lengths in found), key=lambda x: len(x.ids))


def passes(found: Sequence[Leaf], *, tokens_per_pass: int) -> Iterator[list[Leaf]]:
    """Leaves of like length together, padded within ``tokens_per_pass``, or alone."""
    batch: list[Leaf] = []
    states = 0
    for leaf in found:
        states += len(leaf.lengths)
        if batch and ((len(batch) + 1) * len(leaf.ids) > tokens_per_pass or states > _STATES_PER_PASS):
            yield batch
            batch, states = [], len(leaf.lengths)
        batch.append(leaf)
    if batch:
        yield batch


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a state is: the row of its leaf, its length, its row of logits, and its most new tokens."""

    row: int
    length: int
    index: int
    new_tokens: int


class ForkingDecoder:
    """A :class:`SharedDecoder` whose prompts are states of forwarded leaves; same interface."""

    refills = True

    def __init__(
        self, model: Any, decoder: SharedDecoder, batch: Sequence[Leaf], new_tokens: Mapping[Ids, int], *, pad_id: int
    ) -> None:
        """Forward the leaves of a pass once. ``new_tokens`` is the most new tokens of each state."""
        from transformers import DynamicCache

        self._decoder, self._device = decoder, model.device
        self._cache: Any = DynamicCache()
        width = max(len(leaf.ids) for leaf in batch)
        states = [(row, leaf.ids[:length]) for row, leaf in enumerate(batch) for length in leaf.lengths]
        self._places = {
            ids: _Place(row=row, length=len(ids), index=index, new_tokens=new_tokens[ids])
            for index, (row, ids) in enumerate(states)
        }
        # Padding is on the right, where a causal mask hides it from every real token.
        padded = [[*leaf.ids, *[pad_id] * (width - len(leaf.ids))] for leaf in batch]
        inputs = {
            "input_ids": torch.tensor(padded, device=self._device),
            "past_key_values": self._cache,
            "use_cache": True,
        }
        last = [place.row * width + place.length - 1 for place in self._places.values()]
        self._logits_SV = own_logits(model, inputs, torch.tensor(last, device=self._device))

    def admit(
        self, prompts: Sequence[Sequence[int]], group_size: int, new_tokens_fed: Sequence[int] | None = None
    ) -> Tensor:
        """Logits [P·G, V] of the first tokens; the rows of a state are neighbours and follow those in flight.

        What has new tokens already is no state any more.
        """
        if new_tokens_fed is not None:
            return self._decoder.admit(prompts, group_size, new_tokens_fed)
        places = [self._places[tuple(ids)] for ids in prompts]
        width = max(place.length for place in places)
        lengths_P1 = self._tensor([place.length for place in places])[:, None]
        # Left padding repeats the first column; the mask hides it.
        columns_PT = lengths_P1 - width + torch.arange(width, device=self._device)
        rows_P1 = self._tensor([place.row for place in places])[:, None]

        def piece(x_BHTD: Tensor) -> Tensor:
            return x_BHTD.transpose(1, 2)[rows_P1, columns_PT.clamp(min=0)].permute(2, 0, 1, 3).contiguous()

        prefilled = Prefilled(
            layers=((piece(layer.keys), piece(layer.values)) for layer in self._cache.layers),
            mask_PT=(columns_PT >= 0).long(),
            logits_PV=self._logits_SV[self._tensor([place.index for place in places])],
            new_tokens_P=self._tensor([place.new_tokens for place in places]),
        )
        return self._decoder.admit_prefilled(prefilled, [group_size] * len(places))

    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits [B, V] after one more token in every row."""
        return self._decoder.step(tokens_B)

    def feed(self, rows: Sequence[int], starts: Sequence[int], ids: Sequence[Sequence[int]]) -> Tensor:
        """See :meth:`SharedDecoder.feed`."""
        return self._decoder.feed(rows, starts, ids)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self._decoder.keep(rows)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self._device)


class RolloutAsked(Prober, Continuing, Protocol):
    """What ``context.rollout`` asks of a rollout engine."""


@dataclass(frozen=True, kw_only=True)
class StepContinuer:
    """The service of one step: an engine's continuations, with their deadline and cost.

    ``usual_tokens`` is the most that the rank's rollout of a step may sample. More than that may take longer than
    ``deadline_s``, in proportion, and so may all that waits for it. Into ``metrics`` go ``continuations/requests``,
    ``continuations/tokens`` (sampled ones), both over all ranks, and ``timing_s/continuations``, a rank's mean.
    """

    engine: Continuing
    step: int
    deadline_s: float
    usual_tokens: int
    metrics: Accumulator = field(default_factory=Accumulator)

    def continue_(self, requests: Sequence[ContinuationRequest]) -> list[list[Completion]]:
        """See :class:`~rltrain.types.Continuer`."""
        start_s = time.perf_counter()
        most_tokens = sum(request.draws * request.max_new_tokens for request in requests)
        deadline_s = self.deadline_s * max(1.0, most_tokens / self.usual_tokens)
        watchdog.extend(deadline_s)
        with dist.stage(f"continuations of step {self.step + 1}", deadline_s):
            continued = self.engine.continue_(requests, step=self.step)
        tokens = sum(completion.written_tokens for completions in continued for completion in completions)
        self.metrics.add(
            {
                "continuations/requests": Sum(value=float(len(requests))),
                "continuations/tokens": Sum(value=float(tokens)),
                "timing_s/continuations": Sum(value=(time.perf_counter() - start_s) / dist.world_size()),
            }
        )
        return continued


def by_sampling(
    requests: Sequence[ContinuationRequest], sampling: SamplingConfig
) -> list[tuple[SamplingConfig, list[int]]]:
    """The indices of requests that sample alike."""
    found: list[tuple[SamplingConfig, list[int]]] = []
    for index, request in enumerate(requests):
        wanted = sampling_of(request, sampling)
        known = next((indices for each, indices in found if each == wanted), None)
        if known is None:
            found.append((wanted, [index]))
        else:
            known.append(index)
    return found


def services_of(
    config: RunConfig, rollout: RolloutAsked, *, step: int, metrics: Accumulator | None = None
) -> RolloutServices:
    """``context.rollout`` of a step: what the parts of the run declared of it."""
    needs, services = config.needs(), RolloutServices()
    if Need.PROBES in needs:
        services = replace(services, prober=rollout)
    if Need.CONTINUATIONS not in needs:
        return services
    batch = config.batch
    usual = batch.prompts_per_step // dist.world_size() * batch.group_size * config.sampling.max_new_tokens
    continuer = StepContinuer(
        engine=rollout,
        step=step,
        deadline_s=config.deadline("rollout"),
        usual_tokens=usual,
        metrics=metrics or Accumulator(),
    )
    return replace(services, continuer=continuer)
