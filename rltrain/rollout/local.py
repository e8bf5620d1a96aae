"""Rollout in this process: the policy's own forward with a KV cache, and a loop that keeps only live rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rltrain.config import RolloutConfig, SamplingConfig, register, require
from rltrain.rollout.plain import PlainDecoder
from rltrain.rollout.shared import SharedDecoder
from rltrain.rollout.sampling import row_key, sample, uniforms
from rltrain.rollout.stopping import StopRule
from rltrain.types import Completion, Group, Prompt


@dataclass(kw_only=True)
class LocalRolloutConfig(RolloutConfig):
    """``max_rows`` completions are decoded together (at least one group); the others queue and refill the batch.

    Rows are looked at every ``check_steps`` token steps; finished ones leave when they are ``compact_share`` of the
    batch. None of the three changes a sampled token.
    """

    max_rows: int = 256
    check_steps: int = 4
    compact_share: float = 0.25

    def __post_init__(self) -> None:
        require(self.max_rows >= 1, f"rollout.max_rows={self.max_rows}: set at least 1")
        require(self.check_steps >= 1, f"rollout.check_steps={self.check_steps}: set at least 1")
        require(
            0 < self.compact_share <= 1, f"rollout.compact_share={self.compact_share}: must lie in (0, 1]; 1 is off"
        )


@dataclass(kw_only=True, slots=True)
class _Row:
    """One completion while it is sampled."""

    prompt_index: int
    sample_index: int
    key: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    done: bool = False


@contextmanager
def _inference(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's training flag is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class _Batch:
    """The rows in flight, and one call of ``generate`` from its first prompt to its last token."""

    def __init__(self, decoder: Any, rule: StopRule, sampling: SamplingConfig, config: LocalRolloutConfig) -> None:
        self._decoder, self._rule, self._sampling, self._config = decoder, rule, sampling, config
        self._rows: list[_Row] = []
        self._tokens_B: Tensor
        self._keys_B: Tensor
        self._ages_B: Tensor

    def _sample(self, logits_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
        s = self._sampling
        return sample(logits_BV, uniforms_B, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)

    def _record(self, tokens_KB: Tensor, logprobs_KB: Tensor, rows: Sequence[_Row]) -> None:
        """Append K tokens to each row and cut those that ended."""
        for row, tokens_K, logprobs_K in zip(rows, tokens_KB.T.tolist(), logprobs_KB.T.tolist(), strict=True):
            if row.done:
                continue
            start = len(row.token_ids)
            row.token_ids += tokens_K
            row.logprobs += logprobs_K
            end = self._rule.end(row.token_ids, start)
            if end is not None:
                del row.token_ids[end:], row.logprobs[end:]
                row.done = True

    def admit(self, prompts: Sequence[Sequence[int]], rows: Sequence[_Row]) -> None:
        """Prefill prompts and sample the first token of their rows."""
        logits_BV = self._decoder.admit(prompts, len(rows) // len(prompts))
        keys_B = torch.tensor([row.key for row in rows], device=logits_BV.device)
        tokens_B, logprobs_B = self._sample(logits_BV, uniforms(keys_B, torch.zeros_like(keys_B)))
        self._record(tokens_B[None], logprobs_B[None], rows)
        new = (tokens_B, keys_B, torch.ones_like(keys_B))
        old = (self._tokens_B, self._keys_B, self._ages_B) if self._rows else ()
        self._tokens_B, self._keys_B, self._ages_B = (
            (torch.cat(pair) for pair in zip(old, new, strict=True)) if old else new
        )
        self._rows += rows

    def decode(self) -> None:
        """``check_steps`` tokens for every row, with one look at the host at the end."""
        left = self._rule.max_new_tokens - min(len(row.token_ids) for row in self._rows if not row.done)
        steps = min(self._config.check_steps, left)
        offsets_K1 = torch.arange(steps, device=self._keys_B.device)[:, None]
        uniforms_KB = uniforms(self._keys_B, self._ages_B + offsets_K1)
        sampled = []
        for uniforms_B in uniforms_KB:
            self._tokens_B, logprobs_B = self._sample(self._decoder.step(self._tokens_B), uniforms_B)
            sampled.append((self._tokens_B, logprobs_B))
        self._ages_B = self._ages_B + steps
        tokens_KB, logprobs_KB = (torch.stack(columns) for columns in zip(*sampled, strict=True))
        self._record(tokens_KB, logprobs_KB, self._rows)

    @property
    def live(self) -> int:
        return sum(not row.done for row in self._rows)

    def compact(self) -> None:
        """Drop finished rows once they are worth the copy."""
        done = len(self._rows) - self.live
        if done < self._config.compact_share * len(self._rows):
            return
        kept = [index for index, row in enumerate(self._rows) if not row.done]
        self._rows = [self._rows[index] for index in kept]
        self._decoder.keep(kept)
        index_B = torch.tensor(kept, device=self._keys_B.device, dtype=torch.int64)
        self._tokens_B, self._keys_B = self._tokens_B[index_B], self._keys_B[index_B]
        self._ages_B = self._ages_B[index_B]

    @property
    def room(self) -> int:
        """Rows that may be admitted now."""
        if not self._rows:
            return self._config.max_rows
        return max(0, self._config.max_rows - len(self._rows)) if self._decoder.refills else 0


@register("rollout", "local", LocalRolloutConfig)
class LocalRollout:
    """Samples with the module that is trained, so there is nothing to synchronise.

    Each prompt is prefilled once for its G samples, all rows are decoded together, and a token depends on nothing but
    its key, its position and its logits (:mod:`rltrain.rollout.sampling`). Log-probs are fp32 and those of the
    distribution that was sampled from.
    """

    def __init__(self, config: LocalRolloutConfig, sampling: SamplingConfig, policy: Any, *, seed: int) -> None:
        self._config, self._sampling, self._policy, self._seed = config, sampling, policy, seed

    def sync(self, policy: Any) -> None:
        """The policy samples by itself; nothing to copy."""
        self._policy = policy

    def generate(
        self, prompts: Sequence[Prompt], *, step: int, group_size: int, sampling: SamplingConfig | None = None
    ) -> list[Group]:
        """``group_size`` completions of each prompt, in the order of ``prompts``; rewards are not set."""
        sampling = sampling or self._sampling
        for prompt in prompts:
            assert 0 < len(prompt.token_ids) <= sampling.max_prompt_tokens, prompt.problem.id
        rows = [
            _Row(prompt_index=p, sample_index=g, key=row_key(self._seed, step, prompt.problem.id, g))
            for p, prompt in enumerate(prompts)
            for g in range(group_size)
        ]
        rule = self._rule(sampling)
        with _inference(self._policy.model):
            self._run(prompts, rows, group_size, sampling, rule)
        return [
            Group(
                prompt=prompt,
                completions=tuple(self._completion(row, rule) for row in rows[p * group_size : (p + 1) * group_size]),
            )
            for p, prompt in enumerate(prompts)
        ]

    def _rule(self, sampling: SamplingConfig) -> StopRule:
        return StopRule(
            stop_ids=frozenset(self._policy.stop_token_ids),
            stop_strings=tuple(sampling.stop),
            max_new_tokens=sampling.max_new_tokens,
            tokenizer=self._policy.tokenizer,
        )

    def _run(
        self, prompts: Sequence[Prompt], rows: Sequence[_Row], group_size: int, sampling: SamplingConfig, rule: StopRule
    ) -> None:
        decoder = self._decoder()
        batch = _Batch(decoder, rule, sampling, self._config)
        queue = deque(range(len(prompts)))
        while queue or batch.live:
            if queue and (groups := batch.room // group_size or int(not batch.live)):
                chosen = [queue.popleft() for _ in range(min(groups, len(queue)))]
                batch.admit(
                    [prompts[p].token_ids for p in chosen],
                    [row for p in chosen for row in rows[p * group_size : (p + 1) * group_size]],
                )
            if batch.live:
                batch.decode()
            batch.compact()

    def _decoder(self) -> PlainDecoder | SharedDecoder:
        model, pad_id = self._policy.model, self._policy.pad_token_id
        if hasattr(model, "get_base_model"):
            # peft: the adapters live inside the base model's own layers.
            model = model.get_base_model()
        if SharedDecoder.supports(model):
            return SharedDecoder(model, pad_id=pad_id)
        return PlainDecoder(model, pad_id=pad_id)

    def _completion(self, row: _Row, rule: StopRule) -> Completion:
        text_ids = row.token_ids[:-1] if row.token_ids[-1] in rule.stop_ids else row.token_ids
        return Completion(
            token_ids=tuple(row.token_ids),
            logprobs=tuple(row.logprobs),
            finish="stop" if rule.stopped(row.token_ids) else "length",
            text=self._policy.tokenizer.decode(text_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        )
