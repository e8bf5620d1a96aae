"""Problems as token ids: chat templates, limits of length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rltrain.config import ModelConfig, SamplingConfig
from rltrain.errors import ConfigError
from rltrain.policy.load import Policy
from rltrain.types import Message, Problem, Prompt, TokenProblem


def encode(policy: Policy, problem: Problem, config: ModelConfig) -> Prompt:
    """A problem as token ids; chat messages (or text with ``config.chat``) go through the tokenizer's template."""

    def render(prompt: str | Sequence[Message]) -> tuple[int, ...]:
        return prompt_ids(policy.tokenizer, prompt, config)

    if isinstance(problem, TokenProblem):
        return problem.encode(policy.tokenizer, render)
    return Prompt(problem=problem, token_ids=render(problem.prompt))


def prompt_ids(tokenizer: Any, prompt: str | Sequence[Message], config: ModelConfig) -> tuple[int, ...]:
    """The ids of a text or of chat messages."""
    if isinstance(prompt, str) and not config.chat:
        return tuple(tokenizer(prompt)["input_ids"])
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    for question, answer in reversed(config.examples):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}, *turns]
    if config.system is not None and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": config.system}, *turns]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_all(
    policy: Policy, problems: Sequence[Problem], config: ModelConfig, *, max_prompt_tokens: int
) -> tuple[list[Prompt], list[Problem]]:
    """Prompts within the limit, and the problems that were left out for being longer (or empty)."""
    prompts = [encode(policy, problem, config) for problem in problems]
    fits = [0 < len(prompt.token_ids) <= max_prompt_tokens for prompt in prompts]
    kept = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
    return kept, [problem for problem, fit in zip(problems, fits, strict=True) if not fit]


def positions(model: Any) -> int | None:
    """How many positions a model knows, by its config; None if it says nothing, or adds a bias to scores instead.

    A factor of its rotations counts, although some configs have it in their number already.
    """
    config = model.config.get_text_config()
    known = getattr(config, "max_position_embeddings", None)
    if not known or known < 0 or getattr(config, "alibi", False):
        return None
    rotations = getattr(config, "rope_parameters", None) or {}
    by_layer = [rotations, *(each for each in rotations.values() if isinstance(each, dict))]
    return int(known * max(float(each.get("factor") or 1) for each in by_layer))


def prompt_limit(policy: Policy, sampling: SamplingConfig) -> int:
    """``sampling.max_prompt_tokens``, or what the model's positions leave beside ``max_new_tokens`` if that is less."""
    known = positions(policy.model)
    if known is None:
        return sampling.max_prompt_tokens
    if known <= sampling.max_new_tokens:
        raise ConfigError(
            f"sampling.max_new_tokens={sampling.max_new_tokens}: leaves no room for a prompt in the model's "
            f"{known} positions; lower it"
        )
    return min(sampling.max_prompt_tokens, known - sampling.max_new_tokens)
