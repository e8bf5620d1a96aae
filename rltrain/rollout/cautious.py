"""Cautious decoding, for evaluation alone: several trials where the policy is unsure (arXiv 2507.03038).

At the start of each segment, H is the entropy of the next token in nats, and

    N = int(1 + 9·clip((H - 0.01)/1.49, 0, 1))

trials are sampled up to the next punctuation mark. The trial of the least perplexity exp(-mean log p) is kept, of equal
ones the first. What is kept does not follow the policy's distribution, so training must not use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rltrain.config import SamplingConfig
from rltrain.errors import require
from rltrain.policy.logprobs import inference
from rltrain.rollout.continuation_types import ContinuationRequest, ContinuationSampling, OneTurn
from rltrain.rollout.hf_decoder import left_padded, padded_positions
from rltrain.rollout.local import LocalRollout
from rltrain.rollout.sampling import distribution, entropy_and_collision, row_key
from rltrain.rollout.stopping import StopRule
from rltrain.types import Completion, Group, Prompt

LEAST_NATS, SPAN_NATS, MOST_MORE = 0.01, 1.49, 9
TOKENS_PER_PASS = 16384


def trials(entropy: float) -> int:
    """N of an entropy in nats: 1 up to 0.01, 10 from 1.5 on."""
    return int(1 + MOST_MORE * min(1.0, max(0.0, (entropy - LEAST_NATS) / SPAN_NATS)))


def likeliest(completions: Sequence[Completion]) -> Completion:
    """The trial of the least perplexity: of the greatest mean log-prob."""
    return max(completions, key=lambda trial: sum(trial.written_logprobs) / len(trial.token_ids))


@dataclass(kw_only=True)
class _Text:
    """A completion that grows by segments."""

    prompt: Prompt
    sample: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    done: bool = False


class CautiousRollout:
    """Generates as a local engine does, segment by segment. It is no engine that a run could train with.

    ``trials`` and ``segments`` count what was sampled.
    """

    def __init__(self, engine: Any, policy: Any, sampling: SamplingConfig, *, marks: Sequence[str], seed: int) -> None:
        require(
            isinstance(engine, LocalRollout),
            "evaluation.cautious=true: reads entropies of a local policy, without an environment; set rollout=local",
        )
        self._engine, self._policy, self._sampling = engine, policy, sampling
        self._marks, self._seed = tuple(marks), seed
        self.uses_policy, self.trials, self.segments = True, 0, 0

    def generate(
        self, prompts: Sequence[Prompt], *, step: int, group_size: int, sampling: SamplingConfig | None = None
    ) -> list[Group]:
        """``group_size`` completions of each prompt, in order. Their draws are a function of what a key names."""
        sampling = sampling or self._sampling
        rule = StopRule.of(self._policy, sampling)
        texts = [_Text(prompt=prompt, sample=sample) for prompt in prompts for sample in range(group_size)]
        while growing := [text for text in texts if not text.done]:
            self._grow(growing, rule, sampling, step)
        made = iter([rule.completion(text.ids, text.logprobs) for text in texts])
        return [Group(prompt=prompt, completions=tuple(next(made) for _ in range(group_size))) for prompt in prompts]

    def _grow(self, texts: Sequence[_Text], rule: StopRule, sampling: SamplingConfig, step: int) -> None:
        """Another segment of each text."""
        counts = [trials(entropy) for entropy in self._entropies(texts, sampling)]
        asked = [(text, trial) for text, count in zip(texts, counts, strict=True) for trial in range(count)]
        requests = [self._request(text, trial, rule, sampling, step) for text, trial in asked]
        drawn = iter(self._engine.continue_(requests, step=step))
        for text, count in zip(texts, counts, strict=True):
            kept = likeliest([next(drawn)[0] for _ in range(count)])
            start = len(text.ids)
            text.ids += kept.token_ids
            text.logprobs += kept.written_logprobs
            end = rule.end(text.ids, start)
            text.ids, text.logprobs, text.done = text.ids[:end], text.logprobs[:end], end is not None
            self.trials, self.segments = self.trials + count, self.segments + 1

    def _request(
        self, text: _Text, trial: int, rule: StopRule, sampling: SamplingConfig, step: int
    ) -> ContinuationRequest:
        left, problem = rule.max_new_tokens - len(text.ids), text.prompt.problem
        name = f"{len(text.ids)}/{trial}/{problem.id}"
        key = row_key(self._seed, step, name, text.sample, text.prompt.occurrence)
        segment = replace(rule, stop_strings=(*rule.stop_strings, *self._marks), max_new_tokens=left, before=())
        return ContinuationRequest(
            problem_id=problem.id,
            sample_index=text.sample,
            prompt_ids=text.prompt.token_ids,
            completion_ids=tuple(text.ids),
            draws=1,
            max_new_tokens=left,
            sampling=ContinuationSampling(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k),
            one_turn=OneTurn(key=key, rule=segment, position=0),
        )

    @torch.no_grad()
    def _entropies(self, texts: Sequence[_Text], sampling: SamplingConfig) -> list[float]:
        """Of the next token of each text, under the distribution that is sampled from."""
        model, found = self._policy.model, []
        longest = max(len(text.prompt.token_ids) + len(text.ids) for text in texts)
        at_once = max(1, TOKENS_PER_PASS // longest)
        with inference(model):
            for first in range(0, len(texts), at_once):
                states = [[*text.prompt.token_ids, *text.ids] for text in texts[first : first + at_once]]
                ids_PT, mask_PT = left_padded(states, self._policy.pad_token_id, model.device)
                output = model(
                    input_ids=ids_PT,
                    attention_mask=mask_PT,
                    position_ids=padded_positions(mask_PT),
                    use_cache=False,
                    logits_to_keep=1,
                )
                chances_BV = distribution(
                    output.logits[:, -1], temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p
                )
                found += entropy_and_collision(chances_BV)[:, 0].tolist()
        return found
