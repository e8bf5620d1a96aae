"""A reward for predicting a document's target: the text that follows a thought, compared with what was cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rltrain.config import RewardConfig
from rltrain.data.text import TextPrompt
from rltrain.errors import ConfigError
from rltrain.registry import register
from rltrain.types import Completion, Context, Group, Mean, Scores


@dataclass(kw_only=True)
class TargetTextConfig(RewardConfig):
    """See :func:`target_text`. For data of documents that are cut, such as ``data=automaton``."""


def predicted(prompt: TextPrompt, completion: Completion) -> str | None:
    """The text after the last closing tag; None for a thought without one that the prompt had opened."""
    before, closing, after = completion.text.rpartition(prompt.closing)
    opened = prompt.token_ids != prompt.context_ids
    return None if opened and not before + closing else after


@register("reward", "target_text", TargetTextConfig)
def target_text(groups: Sequence[Group], config: TargetTextConfig, context: Context) -> Scores:
    """1 where the text after the thought begins with the target, else 0; ``data.horizon=0``: where it is the target.

    Metric ``target_text/thoughts``: the share of completions with a closed thought. ConfigError for a prompt that is
    not cut from a document.
    """
    scores = [_scores(group, context.tokenizer) for group in groups]
    closed = [_prompt(group).closing in each.text for group in groups for each in group.completions]
    return Scores(scores=scores, metrics={"target_text/thoughts": Mean.of(closed)})


def _prompt(group: Group) -> TextPrompt:
    if not isinstance(group.prompt, TextPrompt):
        raise ConfigError(f"rewards: target_text needs a document that is cut, and {group.prompt.problem.id} is not")
    return group.prompt


def _scores(group: Group, tokenizer: Any) -> list[float]:
    prompt = _prompt(group)
    target = tokenizer.decode(list(prompt.target_ids))
    is_rest = prompt.target_ids == prompt.continuation_ids
    answers = [predicted(prompt, completion) for completion in group.completions]
    return [float(answer is not None and _matches(answer, target, is_rest)) for answer in answers]


def _matches(answer: str, target: str, is_rest: bool) -> bool:
    return answer == target if is_rest else answer.startswith(target)
