"""The local decoders against an independent forward of the model, before the first step; the fastest right one is used.

The prompts of :mod:`rltrain.policy.model_check`, two rows each, are fed the tokens of their completions: prefill,
cached steps, rows that leave at different times and, where a decoder takes them, rows that join.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rltrain.batching.collate import LossRow, Unit
from rltrain.errors import ConfigError
from rltrain.policy.model_check import COMPLETION_TOKENS, check_units, difference, limit, own_logprobs, quiet, states

log = logging.getLogger(__name__)

JOIN_AT = 2  # the step at which the prompts join once more


class Decoder(Protocol):
    """Rows in flight, each fed its prompt and then token by token."""

    refills: bool

    def admit(self, prompts: Sequence[Sequence[int]], group_size: int) -> Tensor:
        """Logits [P·G, V] of the first tokens."""
        ...

    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits [B, V] after one more token in every row, good until the next call."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        ...


class DecoderKind(NamedTuple):
    """A way to decode; ``make`` takes the most new tokens."""

    name: str
    make: Callable[[int], Decoder]


def check_decoders(model: Any, kinds: Sequence[DecoderKind]) -> list[DecoderKind]:
    """The kinds without the first of them that are wrong; ConfigError if all are. All ranks call this together."""
    left, units = list(kinds), check_units(model)
    with quiet(model):
        for state in states(model):
            with state:
                own_N = own_logprobs(model, units)
                while not _fits(model, left, units, own_N):
                    del left[0]
    return left


def _fits(model: Any, left: Sequence[DecoderKind], units: Sequence[Unit], own_N: Tensor) -> bool:
    def logprobs() -> Tensor:  # [1 or 2, N]: rows that join come as a second line
        return decoder_logprobs(left[0].make(max(COMPLETION_TOKENS)), units).view(-1, len(own_N))

    apart = difference(logprobs, own_N, limit(model, own_N))
    name = type(model).__name__
    if not apart.fits and len(left) == 1:
        raise ConfigError(
            f"rollout: log-probs of {name} by {left[0].name} are {apart}; this architecture cannot be sampled here"
        )
    if not apart.fits:
        slower = "; it is slow, consider rollout=vllm" if len(left) == 2 else ""
        log.warning(
            "rollout: log-probs of %s by %s are %s; %s is used%s", name, left[0].name, apart, left[1].name, slower
        )
    return apart.fits


def decoder_logprobs(decoder: Decoder, units: Sequence[Unit]) -> Tensor:
    """[N] of all completions in order, and behind them once more where rows may join."""
    rows: list[LossRow] = []
    logprobs: list[list[Tensor]] = []
    flight: list[int] = []

    def admit() -> Tensor:
        new = [row for unit in units for row in unit]
        flight.extend(range(len(rows), len(rows) + len(new)))
        rows.extend(new)
        logprobs.extend([] for _ in new)
        return decoder.admit([unit[0].prompt_ids for unit in units], len(units[0]))

    def take(logits_BV: Tensor, indices: Sequence[int]) -> None:
        logprobs_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)).log_softmax(-1)
        for index, logprobs_V in zip(indices, logprobs_BV, strict=True):
            logprobs[index].append(logprobs_V[rows[index].completion_ids[len(logprobs[index])]])

    logits_BV = admit()
    take(logits_BV, flight)
    for step in range(len(COMPLETION_TOKENS) * max(COMPLETION_TOKENS)):
        live = [place for place, i in enumerate(flight) if len(logprobs[i]) < len(rows[i].completion_ids)]
        if len(live) < len(flight):
            decoder.keep(live)
            flight[:] = [flight[place] for place in live]
        if not flight:
            break
        if decoder.refills and step == JOIN_AT:
            before = len(flight)
            take(admit(), flight[before:])
            continue
        fed = [rows[i].completion_ids[len(logprobs[i]) - 1] for i in flight]
        take(decoder.step(torch.tensor(fed, device=logits_BV.device)), flight)
    return torch.stack([value for values in logprobs for value in values])
