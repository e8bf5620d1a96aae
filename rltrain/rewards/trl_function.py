"""Reward functions written for TRL: ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rltrain.registry import register
from rltrain.rewards.custom import UserRewardConfig, is_list_of_scores
from rltrain.types import Completion, Context, Group, Scores


@dataclass(kw_only=True)
class TrlFunctionConfig(UserRewardConfig):
    """``import_path`` names the function. Columns: the keys of ``meta``, whose values are passed as they are.

    ``answer`` and ``solution`` are the gold as text, unless ``meta`` holds them.
    """


def trl_arguments(groups: Sequence[Group], context: Context) -> dict[str, list]:
    """The keyword arguments of TRL's contract, one entry per completion, groups contiguous.

    A chat prompt gives chat completions, a text prompt gives text. With turns these are all messages, an environment's
    replies under the role "tool", or the text of the last turn. ``completion_ids`` are all ids.
    """
    rows = [(group.prompt.problem, completion) for group in groups for completion in group.completions]
    columns = {key for problem, _ in rows for key in problem.meta}
    arguments: dict[str, list] = {key: [problem.meta.get(key) for problem, _ in rows] for key in sorted(columns)}
    return arguments | {
        "answer": [problem.meta.get("answer", problem.answer) for problem, _ in rows],
        "solution": [problem.meta.get("solution", problem.answer) for problem, _ in rows],
        "prompts": [problem.prompt if isinstance(problem.prompt, str) else list(problem.prompt) for problem, _ in rows],
        "completions": [
            completion.text if isinstance(problem.prompt, str) else _messages(completion)
            for problem, completion in rows
        ],
        "completion_ids": [list(completion.token_ids) for _, completion in rows],
    }


def _messages(completion: Completion) -> list[dict[str, str]]:
    if not completion.turns:
        return [{"role": "assistant", "content": completion.text}]
    texts = [*(turn.text for turn in completion.turns[:-1]), completion.text]  # that of a failed turn is no answer
    said = [(("assistant", text), ("tool", turn.reply)) for text, turn in zip(texts, completion.turns, strict=True)]
    return [{"role": role, "content": text} for pair in said for role, text in pair if role == "assistant" or text]


@register("reward", "trl_function", TrlFunctionConfig)
def trl_function(groups: Sequence[Group], config: TrlFunctionConfig, context: Context) -> Scores:
    """Call the function once for the batch and give its list back by group."""
    values = config.load()(**trl_arguments(groups, context))
    expected = sum(len(group.completions) for group in groups)
    if not is_list_of_scores(values):
        raise TypeError(
            f"{config.import_path} returned a {type(values).__name__}, expected a list of {expected} rewards"
        )
    if len(values) != expected:
        raise ValueError(f"{config.import_path} returned {len(values)} rewards for {expected} completions")
    remaining = iter(values)
    return Scores(scores=[[next(remaining) for _ in group.completions] for group in groups])
