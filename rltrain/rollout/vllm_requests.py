"""What a vLLM engine is asked for, and what it answers: token ids in, token ids and their log-probs out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from rltrain.config import SamplingConfig
from rltrain.rollout.sampling import row_key
from rltrain.rollout.stopping import StopRule


@dataclass(frozen=True, kw_only=True)
class Request:
    """One completion to sample; ``fields`` replace those of the call for this one."""

    prompt_ids: tuple[int, ...]
    seed: int
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The ids that an engine gave, and the log-prob of each under the distribution it was drawn from."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class SamplingEngine(Protocol):
    """An engine of vLLM, wherever it runs."""

    def sample(self, requests: Sequence[Request], fields: dict[str, Any]) -> list[Sampled]:
        """One answer per request, in order; ``fields`` are vLLM's ``SamplingParams`` but for the seed."""
        ...

    def awake(self) -> AbstractContextManager[None]:
        """Between the calls in here the engine keeps its weights and what it cached."""
        ...

    def push(self, model: Any) -> None:
        """Take over the weights of a transformers model; all ranks call this together."""
        ...


def request_seed(seed: int, step: int, problem_id: str, sample_index: int, occurrence: int = 0) -> int:
    """The local sampler's key of the same completion as vLLM's seed."""
    return seed_of(row_key(seed, step, problem_id, sample_index, occurrence))


def seed_of(key: int) -> int:
    """63 bits of a key: vLLM reads -1 as no seed."""
    return key & (2**63 - 1)


def sampling_fields(sampling: SamplingConfig, rule: StopRule) -> dict[str, Any]:
    """Every field of ``SamplingParams`` that matters, so that no default of a model's folder or of vLLM's takes part.

    The model's own end of text is ignored in favour of the policy's stop ids, of which it is one.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": rule.max_new_tokens,
        "min_tokens": 0,
        "stop": list(rule.stop_strings),
        "stop_token_ids": sorted(rule.stop_ids),
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": bool(rule.stop_strings),
        "skip_special_tokens": False,
    }
