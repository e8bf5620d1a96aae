"""RLP: what a thought is worth is how much better the model then predicts the text (arXiv 2510.01265)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rltrain.advantages.group import group_advantages
from rltrain.config import RewardConfig
from rltrain.data.text import TextPrompt
from rltrain.errors import ConfigError, require
from rltrain.registry import register
from rltrain.types import Completion, Context, Group, Mean, Need, Notes, Scores, SpanRequest


def information_gain(
    thought_logprobs: Sequence[float] | Tensor, baseline_logprob: float | Tensor
) -> tuple[Tensor, Tensor]:
    """``r_i = log p_theta(x | prefix, thought_i) - log p_phi(x | prefix)`` in nats, ``A_i = r_i - mean of the others``.

    ``thought_logprobs`` is [G], ``baseline_logprob`` one number. Both results are float64 [G], without gradient. No
    standard deviation: A = G/(G-1)·(r - mean r). The baseline is the same for all thoughts, so it cancels in A and
    remains in r. All-equal scores and G = 1 give exact zeros. A NaN score abstains and gets 0.
    """
    thoughts_G = torch.as_tensor(thought_logprobs, dtype=torch.float64).detach()
    rewards_G = thoughts_G - torch.as_tensor(baseline_logprob, dtype=torch.float64).detach()
    return rewards_G, group_advantages(rewards_G, baseline="leave_one_out", scale="none")


@dataclass(kw_only=True)
class InformationGainConfig(RewardConfig):
    """``discount`` weighs the h-th target token (from 0) by ``discount**h``. For phi see ``ScorerConfig``."""

    discount: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.discount <= 1, f"reward.discount={self.discount}: must lie in (0, 1]; 1 weighs all alike")


def is_closed(prompt: TextPrompt, completion: Completion) -> bool:
    """Whether the thought ends with its closing tag."""
    at_end = completion.token_ids[-len(prompt.closing_ids) :] == prompt.closing_ids
    return at_end or prompt.closing in completion.text


def thought_request(prompt: TextPrompt, completion: Completion) -> SpanRequest:
    """The target after prompt and sampled thought. An open thought loses its stop token and gets the closing tag."""
    thought_ids = completion.token_ids
    if not is_closed(prompt, completion):
        sampled_ids = thought_ids[:-1] if completion.finish == "stop" else thought_ids
        thought_ids = sampled_ids + prompt.closing_ids
    ids = prompt.token_ids + thought_ids + prompt.target_ids
    start = len(ids) - len(prompt.target_ids)
    return SpanRequest(token_ids=ids, spans=((start, len(ids)),), prompt_tokens=len(prompt.token_ids))


def baseline_request(prompt: TextPrompt) -> SpanRequest:
    """The target directly after the prefix, without instruction and thought."""
    ids, start = prompt.context_ids + prompt.target_ids, len(prompt.context_ids)
    return SpanRequest(token_ids=ids, spans=((start, len(ids)),), prompt_tokens=start)


@register("reward", "information_gain", InformationGainConfig, needs={Need.SCORER})
def information_gain_reward(groups: Sequence[Group], config: InformationGainConfig, context: Context) -> Scores:
    """:func:`information_gain` of each thought, summed over the target tokens. Theta is the current policy."""
    prompts = [_text_prompt(group, context.tokenizer) for group in groups]
    pairs = [
        (prompt, completion) for group, prompt in zip(groups, prompts, strict=True) for completion in group.completions
    ]
    thought_spans = context.scorer.policy([thought_request(*pair) for pair in pairs])
    baseline_spans = context.scorer.phi([baseline_request(prompt) for prompt in prompts])
    thoughts, baselines = _summed(thought_spans, config.discount), _summed(baseline_spans, config.discount)
    sizes = [len(group.completions) for group in groups]
    gains = [information_gain(*pair)[0] for pair in zip(thoughts.split(sizes), baselines, strict=True)]
    gains_N = torch.cat([torch.zeros(0, dtype=torch.float64), *gains])
    metrics = {
        "information_gain/mean": Mean.of(gains_N),
        "information_gain/share_positive": Mean.of(gains_N > 0),
        "accuracy": Mean.of(gains_N > 0),  # a thought is right where it helps
        "information_gain/thought_logprob": Mean.of(thoughts),
        "information_gain/baseline_logprob": Mean.of(baselines),
        "information_gain/share_unclosed": Mean.of([not is_closed(*pair) for pair in pairs]),
    }
    remaining = iter(thought_spans)
    notes = [
        _notes(prompt, [next(remaining)[0] for _ in range(size)], baseline_H, context.tokenizer)
        for prompt, size, (baseline_H,) in zip(prompts, sizes, baseline_spans, strict=True)
    ]
    right = [(gains_G > 0).tolist() for gains_G in gains]
    return Scores(scores=[gains_G.tolist() for gains_G in gains], right=right, metrics=metrics, notes=notes)


def _notes(prompt: TextPrompt, thoughts: Sequence[Tensor], baseline_H: Tensor, tokenizer: Any) -> Notes:
    """Notes on a group for its samples: the cut of its document, and each thought's gain on each target token."""
    targets = [tokenizer.decode([token]) for token in prompt.target_ids]
    return {
        "position": [[len(prompt.context_ids)]] * len(thoughts),
        "target_tokens": [targets] * len(thoughts),
        "target_gain": [(thought_H - baseline_H).tolist() for thought_H in thoughts],
    }


def _summed(scored: Sequence[Sequence[Tensor]], discount: float) -> Tensor:
    """Per request, the discounted sum over the tokens of its only span, float64."""
    sums = [sum(discount**h * value for h, value in enumerate(span.tolist())) for (span,) in scored]
    return torch.tensor(sums, dtype=torch.float64)


def _text_prompt(group: Group, tokenizer: Any) -> TextPrompt:
    """The group's prompt. ConfigError if it has no target, or if a thought goes on after its closing tag."""
    prompt = group.prompt
    if not isinstance(prompt, TextPrompt):
        raise ConfigError(
            f"rewards: an information gain needs text to predict, and {prompt.problem.id} has none; choose text data"
        )
    for completion in group.completions:
        require(
            prompt.closing not in tokenizer.decode(completion.written_ids[:-1]),
            f"sampling.stop: lacks {prompt.closing!r}, so that thoughts go on after their end; add it",
        )
    return prompt
