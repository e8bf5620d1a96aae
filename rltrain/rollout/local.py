"""Rollout in this process: the policy's own weights, a KV cache, and a loop that keeps only live rows."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from rltrain.config import SamplingConfig
from rltrain.engine.deepspeed import is_sharded
from rltrain.errors import require
from rltrain.policy.logprobs import inference
from rltrain.registry import register
from rltrain.rollout import probes
from rltrain.rollout.cache_limit import free_bytes, limit_tokens, refuse_small_cache
from rltrain.rollout.continuation_types import ContinuationRequest
from rltrain.rollout.continuations import ForkingDecoder, by_sampling, check_requests, draw_key, leaves, passes, rule_of
from rltrain.rollout.conversation import Answers
from rltrain.rollout.decoder_check import Decoder, DecoderKind, check_decoders
from rltrain.rollout.hf_decoder import PlainDecoder, UncachedDecoder
from rltrain.rollout.llama_step import LlamaStep
from rltrain.rollout.local_batch import LocalBatch
from rltrain.rollout.local_config import LocalRolloutConfig as LocalRolloutConfig
from rltrain.rollout.probe_types import ProbeRequest, ProbeResult, ProbeSettings
from rltrain.rollout.rows import Job, Row
from rltrain.rollout.sampling import row_key
from rltrain.rollout.shared_prompt_decoder import SharedDecoder
from rltrain.rollout.stopping import StopRule
from rltrain.types import Completion, Group, Prompt

log = logging.getLogger(__name__)


@register("rollout", "local", LocalRolloutConfig)
class LocalRollout:
    """Samples with the module that is trained.

    Each prompt is prefilled once for its G samples, all rows are decoded together, and a token depends on nothing but
    its key, its position and its logits (:mod:`rltrain.rollout.sampling`). Log-probs are fp32 and those of the
    distribution that was sampled from.
    """

    uses_policy = True
    keeps_entropies = False  # whether completions carry entropies, for ``Need.ENTROPY``

    def __init__(self, config: LocalRolloutConfig, sampling: SamplingConfig, policy: Any, *, seed: int) -> None:
        self._config, self._sampling, self._policy, self._seed = config, sampling, policy, seed
        self._model = policy.model
        if config.dtype == "bfloat16" and policy.model.dtype != torch.bfloat16:
            require(
                not any(is_sharded(parameter) for parameter in policy.model.parameters()),
                "rollout.dtype=bfloat16 with deepspeed.zero_stage=3: the weights to copy are sharded; set "
                "rollout.dtype=policy or rollout.ahead=true",
            )
            self._model = copy.deepcopy(policy.model).requires_grad_(False).to(torch.bfloat16)
        self._kinds = self._all_kinds()
        require(
            not config.speculate_tokens or SharedDecoder.supports(self._base),
            f"rollout.speculate_tokens={config.speculate_tokens}: {type(self._base).__name__} cannot take back a token "
            "that it was fed (docs/rollout.md); set 0",
        )

    @property
    def same_distribution(self) -> bool:
        """Whether the log-probs are the policy's own, so that the trainer need not compute them again.

        Below fp32 they are not: decoding rounds otherwise than a forward of whole rows, by hundredths of a nat. Merged
        LoRA in fp32 is within 1e-5 nats.
        """
        return self._model is self._policy.model and self._model.dtype.itemsize >= 4

    @property
    def decoder_name(self) -> str:
        """The decoder in use, in words."""
        return self._kinds[0].name

    def check(self) -> None:
        """Take the fastest decoder that is right; see :func:`~rltrain.rollout.decoder_check.check_decoders`."""
        # Made anew: under ZeRO 3 the weights were not whole when the engine was built, and are now.
        self._kinds = check_decoders(self._base, self._all_kinds())

    def probe(self, requests: Sequence[ProbeRequest], settings: ProbeSettings) -> list[ProbeResult]:
        """Continuations from inside completions, for estimators that declare ``Need.PROBES``."""
        return probes.probe(self._policy, requests, settings)

    def continue_(self, requests: Sequence[ContinuationRequest], *, step: int) -> list[list[Completion]]:
        """Continuations from inside completions, for parts that declare ``Need.CONTINUATIONS``.

        A decoder that shares prompts forks the caches of forwarded completions. Any other one prefills every distinct
        state anew, and says so once.
        """
        rule = StopRule.of(self._policy, self._sampling)
        check_requests(requests, self._sampling, rule)
        rows = [
            [
                Row(key=draw_key(self._seed, step, request, draw), rule=rule_of(request, rule))
                if request.one_turn is None
                else Row(key=request.one_turn.key, rule=rule_of(request, rule), offset=request.one_turn.position)
                for draw in range(request.draws)
            ]
            for request in requests
        ]
        self.sample_continued(requests, rows)
        return [[row.rule.completion(row.token_ids, row.logprobs) for row in some] for some in rows]

    def sample_continued(
        self, requests: Sequence[ContinuationRequest], rows: Sequence[Sequence[Row]], answers: Answers | None = None
    ) -> None:
        """Sample the rows that continue the state of each request to their ends."""
        with inference(self._model):
            for sampling, indices in by_sampling(requests, self._sampling):
                states: dict[tuple[int, ...], list[Row]] = {}
                for index in indices:
                    states.setdefault(requests[index].prefix_ids, []).extend(rows[index])
                self._run_states(states, sampling, answers)

    def _run_states(
        self, states: Mapping[tuple[int, ...], Sequence[Row]], sampling: SamplingConfig, answers: Answers | None
    ) -> None:
        """Sample the rows of every state, pass by pass; states of as many rows are neighbours in the queue."""
        new_tokens = {ids: max(row.most_tokens for row in rows) for ids, rows in states.items()}
        for batch in passes(leaves(states), tokens_per_pass=self._config.prefix_tokens_per_pass):
            inside = [leaf.ids[:length] for leaf in batch for length in leaf.lengths]
            decoder = self._decoder(max(new_tokens[ids] for ids in inside))
            if not isinstance(decoder, SharedDecoder):
                _warn_once(self.decoder_name)
            else:
                pad_id = self._policy.pad_token_id
                decoder = ForkingDecoder(self._base, decoder, batch, new_tokens, pad_id=pad_id)
            jobs = [Job(prompt_ids=ids, rows=states[ids]) for ids in inside]
            LocalBatch(decoder, sampling, self._config, self._limit_tokens(), answers).run(
                sorted(jobs, key=lambda job: len(job.rows))
            )

    def sync(self, policy: Any) -> None:
        """Nothing to copy, unless decoding has weights of its own."""
        if self._model is policy.model:
            return
        with torch.no_grad():
            for mine, theirs in zip(self._model.parameters(), policy.model.parameters(), strict=True):
                mine.copy_(theirs)

    def generate(
        self, prompts: Sequence[Prompt], *, step: int, group_size: int, sampling: SamplingConfig | None = None
    ) -> list[Group]:
        """``group_size`` completions of each prompt, in the order of ``prompts``; rewards are not set."""
        sampling = sampling or self._sampling
        rule = StopRule.of(self._policy, sampling)
        for prompt in prompts:
            assert 0 < len(prompt.token_ids) <= sampling.max_prompt_tokens, prompt.problem.id
        jobs = [
            Job(
                prompt_ids=prompt.token_ids,
                rows=[
                    Row(
                        key=row_key(self._seed, step, prompt.problem.id, g, prompt.occurrence),
                        rule=rule,
                        entropies=[] if self.keeps_entropies else None,
                    )
                    for g in range(group_size)
                ],
            )
            for prompt in prompts
        ]
        self.sample(jobs, sampling)
        return [
            Group(prompt=prompt, completions=tuple(row.completion() for row in job.rows))
            for prompt, job in zip(prompts, jobs, strict=True)
        ]

    def sample(self, jobs: Sequence[Job], sampling: SamplingConfig, answers: Answers | None = None) -> None:
        """Sample the rows of every job to their ends; their conversations are with ``answers``."""
        longest = max((len(job.prompt_ids) for job in jobs), default=0)
        rows = max((len(job.rows) for job in jobs), default=0)
        with inference(self._model):
            decoder = self._decoder(sampling.max_new_tokens)  # before the look at what is free: it merges adapters
            limit = self._limit_tokens()
            refuse_small_cache(limit, prompt_tokens=longest, rows=rows, new_tokens=sampling.max_new_tokens)
            LocalBatch(decoder, sampling, self._config, limit, answers).run(jobs)

    @property
    def _base(self) -> Any:
        # peft: the adapters live inside the base model's own layers.
        return self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model

    def _all_kinds(self) -> list[DecoderKind]:
        graphs = self._config.cuda_graph == "auto"
        return decoder_kinds(self._base, pad_id=self._policy.pad_token_id, graphs=graphs)

    def _limit_tokens(self) -> int | None:
        """What the cache may hold. Of models whose cache has another form only the configured number is known."""
        free = free_bytes(self._base.device) if SharedDecoder.supports(self._base) else None
        configured, rows = self._config.max_cache_tokens, self._config.max_rows
        return limit_tokens(self._base, configured=configured, rows=rows, free=free)

    def _decoder(self, max_new_tokens: int) -> Decoder:
        return self._kinds[0].make(max_new_tokens)


@functools.cache
def _warn_once(decoder_name: str) -> None:
    log.warning(
        "%s cannot fork caches: continuations forward every state from its first token, about half the completion's "
        "length more for each state that is asked",
        decoder_name,
    )


def decoder_kinds(model: Any, *, pad_id: int, graphs: bool = False) -> list[DecoderKind]:
    """The decoders that a model may have, fastest first; ``graphs`` lets the fastest replay CUDA graphs."""

    def shared(max_new_tokens: int, *, fused: bool) -> Decoder:
        return SharedDecoder(model, pad_id=pad_id, max_new_tokens=max_new_tokens, fused=fused, graphs=graphs)

    kinds = [
        DecoderKind("the decoder with its own cache", lambda _: PlainDecoder(model, pad_id=pad_id)),
        DecoderKind("the decoder without a cache", lambda _: UncachedDecoder(model, pad_id=pad_id)),
    ]
    if SharedDecoder.supports(model):
        kinds.insert(0, DecoderKind("the decoder that shares prompts", partial(shared, fused=False)))
        if LlamaStep.supports(model):
            kinds.insert(0, DecoderKind("the decoder for Llama-shaped models", partial(shared, fused=True)))
    return kinds
