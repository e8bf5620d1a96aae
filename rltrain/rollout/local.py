"""Rollout in this process: the policy's own weights, a KV cache, and a loop that keeps only live rows."""

from __future__ import annotations

import copy
import functools
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rltrain.config import RolloutConfig, SamplingConfig
from rltrain.engine.deepspeed import is_sharded
from rltrain.errors import require
from rltrain.policy.logprobs import inference
from rltrain.registry import register
from rltrain.rollout import probes
from rltrain.rollout.cache_limit import free_bytes, limit_tokens, refuse_small_cache
from rltrain.rollout.continuation_types import ContinuationRequest
from rltrain.rollout.continuations import ForkingDecoder, by_sampling, check_requests, draw_key, leaves, passes
from rltrain.rollout.decoder_check import Decoder, DecoderKind, check_decoders
from rltrain.rollout.hf_decoder import PlainDecoder, UncachedDecoder
from rltrain.rollout.llama_step import LlamaStep
from rltrain.rollout.probe_types import ProbeRequest, ProbeResult, ProbeSettings
from rltrain.rollout.rows import Job, Row
from rltrain.rollout.sampling import entropy_and_collision, row_key, sample_with_distribution, uniforms
from rltrain.rollout.shared_prompt_decoder import SharedDecoder
from rltrain.rollout.speculation import GroupDrafts, accepted
from rltrain.rollout.stopping import StopRule
from rltrain.types import Completion, Group, Prompt

log = logging.getLogger(__name__)

MOST_GUESSES = 8


@dataclass(kw_only=True)
class LocalRolloutConfig(RolloutConfig):
    """How much is decoded at once; only ``dtype`` changes what is sampled.

    At most ``max_rows`` completions, or one group, are in flight; the others queue and refill the batch. The cache
    holds at most ``max_cache_tokens`` (0: what is free on a GPU, no limit on a CPU). When it is full, the youngest rows
    go back to the queue with their tokens. Rows are looked at every ``check_steps`` tokens (0: 4 on a CPU, 16
    elsewhere); finished ones leave when they are
    ``compact_share`` of the batch. ``cuda_graph=auto`` replays the steps of Llama-shaped models as CUDA graphs.
    ``dtype=bfloat16`` decodes with a cast copy of the weights, renewed by ``sync``; ``policy`` with the policy itself.
    Prefill and continuations forward ``prefix_tokens_per_pass`` tokens at a time (a single prompt may have more).
    ``speculate_tokens`` (0: none) guesses so many of the next tokens of each row, once nothing queues and at most
    ``speculate_rows`` rows are left (:mod:`rltrain.rollout.speculation`).
    """

    max_rows: int = 256
    max_cache_tokens: int = 0
    check_steps: int = 0
    compact_share: float = 0.25
    cuda_graph: str = "auto"
    dtype: str = "policy"
    prefix_tokens_per_pass: int = 16384
    speculate_tokens: int = 0
    speculate_rows: int = 8

    def __post_init__(self) -> None:
        require(self.max_rows >= 1, f"rollout.max_rows={self.max_rows}: set at least 1")
        require(self.max_cache_tokens >= 0, f"rollout.max_cache_tokens={self.max_cache_tokens}: 0 means what is free")
        require(self.check_steps >= 0, f"rollout.check_steps={self.check_steps}: 0 means the device's usual number")
        require(self.cuda_graph in ("auto", "off"), f"rollout.cuda_graph={self.cuda_graph}: unknown; set auto or off")
        require(
            self.prefix_tokens_per_pass >= 1,
            f"rollout.prefix_tokens_per_pass={self.prefix_tokens_per_pass}: set at least 1; 16384 is usual",
        )
        require(
            0 < self.compact_share <= 1, f"rollout.compact_share={self.compact_share}: must lie in (0, 1]; 1 is off"
        )
        require(self.dtype in ("policy", "bfloat16"), f"rollout.dtype={self.dtype}: unknown; set policy or bfloat16")
        require(
            0 <= self.speculate_tokens <= MOST_GUESSES,
            f"rollout.speculate_tokens={self.speculate_tokens}: must lie in 0..{MOST_GUESSES}; 0 is off",
        )
        require(self.speculate_rows >= 1, f"rollout.speculate_rows={self.speculate_rows}: set at least 1")

    def steps_between_looks(self, device_type: str) -> int:
        """``check_steps``, or what is usual: where launches are asynchronous a look at the tokens stops all of them."""
        return self.check_steps or (4 if device_type == "cpu" else 16)

    def decode_dtype(self) -> str:
        return self.dtype

    def rows_in_flight(self, completions: int) -> int:
        return min(completions, self.max_rows)


class _Batch:
    """The rows in flight: a decoder's rows, the last token of each, and what was sampled so far."""

    def __init__(
        self, decoder: Decoder, sampling: SamplingConfig, config: LocalRolloutConfig, limit_tokens: int | None
    ) -> None:
        self._decoder, self._sampling, self._config, self._limit_tokens = decoder, sampling, config, limit_tokens
        self._was_full = False  # rows were sent back, and none has ended since
        self._longest_tokens = 0  # of the completions that have ended
        self._rows: list[Row] = []
        self._jobs: list[Job] = []
        self._tokens_B: Tensor
        self._keys_B: Tensor
        self._positions_B: Tensor  # of the next completion token
        self._drafts: dict[int, tuple[GroupDrafts, int]] = {}  # of each row and its place in the group, by id

    def run(self, jobs: Sequence[Job]) -> None:
        """Sample every row of every job to its end."""
        queue = deque(jobs)
        while queue or self._rows:
            while fitting := self._fitting(queue):
                self._admit(fitting)
            if not all(row.done for row in self._rows):
                self._make_room(queue)
                if not queue and self._speculates():
                    self._decode_guessing()
                else:
                    self._decode()
            self._compact()

    def _fitting(self, queue: deque[Job]) -> list[Job]:
        """Take from the queue what may start now: jobs of as many rows each, and at least one if none is in flight."""
        chosen: list[Job] = []
        if self._rows and (self._was_full or not self._decoder.refills):
            return chosen
        while queue and len(queue[0].rows) == len((chosen or queue)[0].rows):
            if (self._rows or chosen) and not self._has_room([*chosen, queue[0]]):
                break
            chosen.append(queue.popleft())
        return chosen

    def _has_room(self, jobs: Sequence[Job]) -> bool:
        """Whether the jobs fit into the rows and the cache and, where others may join later, into one prefill."""
        rows = [*self._rows, *(row for job in jobs for row in job.rows)]
        longest = max(len(job.prefix_ids) for job in jobs)
        pieces = self._decoder.refills and len(jobs) > 1
        if len(rows) > self._config.max_rows:
            return False
        if pieces and len(jobs) * longest > self._config.prefix_tokens_per_pass:
            return False
        if self._limit_tokens is None:
            return True
        if not isinstance(self._decoder, SharedDecoder):  # rows that are in flight end there: reserve for all of them
            prompt_tokens = sum(len(job.prompt_ids) for job in (*self._jobs, *jobs))
            return prompt_tokens + sum(row.rule.max_new_tokens for row in rows) <= self._limit_tokens
        expected = max(self._longest_tokens, max(row.rule.max_new_tokens for row in rows) // 4)
        expected_tokens = self._decoder.cache_tokens(expected, len(self._rows), more_prompts=[longest] * len(jobs))
        new_rows = len(rows) - len(self._rows)
        return expected_tokens + new_rows * max(expected, self._decoder.capacity) <= self._limit_tokens

    def _make_room(self, queue: deque[Job]) -> None:
        """Send the youngest rows back to the queue until the cache can grow for the next tokens of the others.

        They keep their tokens, which are prefilled with the prompt later. Until a row ends nothing starts.
        """
        if self._limit_tokens is None or not isinstance(self._decoder, SharedDecoder):
            return
        columns = max(self._config.steps_between_looks(self._keys_B.device.type), 1 + self._config.speculate_tokens)
        if self._decoder.cache_tokens(columns, len(self._rows), grows=True) <= self._limit_tokens:
            return
        self._keep([index for index, row in enumerate(self._rows) if not row.done])
        kept = len(self._rows)
        while kept > 1 and self._decoder.cache_tokens(columns, kept, grows=True) > self._limit_tokens:
            kept -= 1
        if kept < len(self._rows):
            prompt_of = {id(row): job.prompt_ids for job in self._jobs for row in job.rows}
            back = [Job(prompt_ids=prompt_of[id(row)], rows=[row]) for row in self._rows[kept:]]
            queue.extendleft(reversed(back))
            self._keep(range(kept))
            self._was_full = True

    def _admit(self, jobs: Sequence[Job]) -> None:
        """Prefill the prompts and sample the next token of their rows."""
        rows = [row for job in jobs for row in job.rows]
        prefixes, fed = [job.prefix_ids for job in jobs], [len(job.rows[0].token_ids) for job in jobs]
        if any(fed):
            assert isinstance(self._decoder, SharedDecoder)
            logits_BV = self._decoder.admit(prefixes, len(jobs[0].rows), fed)
        else:
            logits_BV = self._decoder.admit(prefixes, len(jobs[0].rows))
        keys_B = torch.tensor([row.key for row in rows], device=logits_BV.device)
        positions_B = torch.tensor([len(row.token_ids) for row in rows], device=logits_BV.device)
        tokens_B, facts_BF = self._sample(logits_BV, uniforms(keys_B, positions_B), rows)
        self._record(rows, tokens_B[None], facts_BF[None])
        positions_B = positions_B + 1
        if self._rows:
            tokens_B, keys_B = torch.cat([self._tokens_B, tokens_B]), torch.cat([self._keys_B, keys_B])
            positions_B = torch.cat([self._positions_B, positions_B])
        self._tokens_B, self._keys_B, self._positions_B = tokens_B, keys_B, positions_B
        self._rows += rows
        self._jobs += jobs

    def _decode(self) -> None:
        """``check_steps`` tokens for every row, and one look at them from the host at the end."""
        left = max(row.left_tokens for row in self._rows if not row.done)
        steps = min(self._config.steps_between_looks(self._keys_B.device.type), left)
        offsets_K1 = torch.arange(steps, device=self._keys_B.device)[:, None]
        sampled = []
        for uniforms_B in uniforms(self._keys_B, self._positions_B + offsets_K1):
            self._tokens_B, facts_BF = self._sample(self._decoder.step(self._tokens_B), uniforms_B, self._rows)
            sampled.append((self._tokens_B, facts_BF))
        self._positions_B = self._positions_B + steps
        tokens_KB, facts_KBF = (torch.stack(columns) for columns in zip(*sampled, strict=True))
        self._record(self._rows, tokens_KB, facts_KBF)

    def _speculates(self) -> bool:
        few = sum(not row.done for row in self._rows) <= self._config.speculate_rows
        return bool(self._config.speculate_tokens) and few and isinstance(self._decoder, SharedDecoder)

    def _decode_guessing(self) -> None:
        """Feed every row its last token and guesses behind it; sample at all of them, keep what the guesses allow."""
        assert isinstance(self._decoder, SharedDecoder)
        left = min(row.left_tokens for row in self._rows if not row.done)
        guesses = [self._guess(row, min(self._config.speculate_tokens, left - 1)) for row in self._rows]
        guessed_BK = torch.tensor(guesses, device=self._keys_B.device, dtype=torch.int64)
        fed_BT = torch.cat([self._tokens_B[:, None], guessed_BK], dim=1)
        offsets_T = torch.arange(fed_BT.shape[1], device=fed_BT.device)
        uniforms_BT = uniforms(self._keys_B[:, None], self._positions_B[:, None] + offsets_T)
        logits_BTV = self._decoder.verify(fed_BT)
        tokens_N, facts_NF = self._sample(logits_BTV.flatten(0, 1), uniforms_BT.flatten(), self._rows)
        tokens_BT, facts_BTF = tokens_N.view_as(fed_BT), facts_NF.unflatten(0, fed_BT.shape)
        counts_B = accepted(fed_BT, tokens_BT)
        self._decoder.accept(counts_B)
        self._tokens_B = tokens_BT.gather(1, counts_B[:, None] - 1).squeeze(1)
        self._positions_B = self._positions_B + counts_B
        counts = counts_B.tolist()
        rows = zip(self._rows, tokens_BT.tolist(), facts_BTF.tolist(), counts, strict=True)
        for row, tokens_T, facts_TF, count in rows:
            row.extend(tokens_T[:count], facts_TF[:count])

    def _guess(self, row: Row, count: int) -> list[int]:
        if row.done or count == 0:
            return [0] * count
        if not self._drafts:
            for job in self._jobs:
                drafts = GroupDrafts(job.prompt_ids, [one.token_ids for one in job.rows])
                self._drafts |= {id(one): (drafts, index) for index, one in enumerate(job.rows)}
        drafts, index = self._drafts[id(row)]
        return drafts.guess(index, count)

    def _sample(self, logits_BV: Tensor, uniforms_B: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Tokens [B], and of each its log-prob and, where the rows want them, entropy and collision [B, F]."""
        config = self._sampling
        tokens_B, logprobs_B, probabilities_BV = sample_with_distribution(
            logits_BV, uniforms_B, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
        )
        if rows[0].entropies is None:
            return tokens_B, logprobs_B[:, None]
        if probabilities_BV is None:  # a point mass
            return tokens_B, torch.stack([logprobs_B, logprobs_B, torch.ones_like(logprobs_B)], dim=-1)
        return tokens_B, torch.cat([logprobs_B[:, None], entropy_and_collision(probabilities_BV)], dim=-1)

    def _record(self, rows: Sequence[Row], tokens_KB: Tensor, facts_KBF: Tensor) -> None:
        """Append K tokens to each row and cut those that ended."""
        facts = facts_KBF.transpose(0, 1).tolist()
        for row, tokens_K, facts_KF in zip(rows, tokens_KB.T.tolist(), facts, strict=True):
            row.extend(tokens_K, facts_KF)

    def _compact(self) -> None:
        """Drop finished rows once they are worth the copy."""
        kept = [index for index, row in enumerate(self._rows) if not row.done]
        if len(self._rows) - len(kept) >= self._config.compact_share * len(self._rows):
            self._keep(kept)

    def _keep(self, kept: Sequence[int]) -> None:
        """Drop all rows but these. Where some had ended, others may start again."""
        self._decoder.keep(kept)
        ended = [len(row.token_ids) for row in self._rows if row.done]
        self._longest_tokens = max(self._longest_tokens, *ended, 0)
        self._was_full = self._was_full and not ended
        self._rows = [self._rows[index] for index in kept]
        in_flight = {id(row) for row in self._rows}
        self._jobs = [job for job in self._jobs if any(id(row) in in_flight for row in job.rows)]
        index_B = torch.tensor(kept, device=self._keys_B.device, dtype=torch.int64)
        self._tokens_B, self._keys_B = self._tokens_B[index_B], self._keys_B[index_B]
        self._positions_B = self._positions_B[index_B]


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
                Row(
                    key=draw_key(self._seed, step, request, draw),
                    rule=rule.after(request.completion_ids, max_new_tokens=request.max_new_tokens),
                )
                for draw in range(request.draws)
            ]
            for request in requests
        ]
        with inference(self._model):
            for sampling, indices in by_sampling(requests, self._sampling):
                states: dict[tuple[int, ...], list[Row]] = {}
                for index in indices:
                    states.setdefault(requests[index].prefix_ids, []).extend(rows[index])
                self._run_states(states, sampling)
        return [[row.rule.completion(row.token_ids, row.logprobs) for row in some] for some in rows]

    def _run_states(self, states: Mapping[tuple[int, ...], Sequence[Row]], sampling: SamplingConfig) -> None:
        """Sample the rows of every state, pass by pass; states of as many rows are neighbours in the queue."""
        new_tokens = {ids: max(row.rule.max_new_tokens for row in rows) for ids, rows in states.items()}
        for batch in passes(leaves(states), tokens_per_pass=self._config.prefix_tokens_per_pass):
            inside = [leaf.ids[:length] for leaf in batch for length in leaf.lengths]
            decoder = self._decoder(max(new_tokens[ids] for ids in inside))
            if not isinstance(decoder, SharedDecoder):
                _warn_once(self.decoder_name)
            else:
                pad_id = self._policy.pad_token_id
                decoder = ForkingDecoder(self._base, decoder, batch, new_tokens, pad_id=pad_id)
            jobs = [Job(prompt_ids=ids, rows=states[ids]) for ids in inside]
            _Batch(decoder, sampling, self._config, self._limit_tokens()).run(
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
        longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
        with inference(self._model):
            decoder = self._decoder(sampling.max_new_tokens)  # before the look at what is free: it merges adapters
            limit_tokens = self._limit_tokens()
            refuse_small_cache(limit_tokens, prompt_tokens=longest, rows=group_size, new_tokens=sampling.max_new_tokens)
            _Batch(decoder, sampling, self._config, limit_tokens).run(jobs)
        return [
            Group(prompt=prompt, completions=tuple(row.completion() for row in job.rows))
            for prompt, job in zip(prompts, jobs, strict=True)
        ]

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
