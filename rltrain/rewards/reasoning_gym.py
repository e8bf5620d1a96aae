"""The score that reasoning_gym's own scorer gives to an answer, for the problems of ``data=reasoning_gym``.

Some scorers evaluate the answer as code. So they run in the sandbox, with a deadline for each answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rltrain.config import RewardConfig
from rltrain.data.boxed import last_boxed
from rltrain.data.reasoning_gym import ENTRY, entry_of
from rltrain.errors import RunError, require, require_one_of
from rltrain.registry import register
from rltrain.rewards.sandbox.pool import ChildReply, Limits, Pool, shared_pool
from rltrain.rewards.verifier.extract import after_thinking
from rltrain.types import Context, Group, Mean, Scores

TARGET = "rltrain.rewards.reasoning_gym:score"
ITEM_S = 5.0
MAX_CHARACTERS = 20_000
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(kw_only=True)
class ReasoningGymRewardConfig(RewardConfig):
    """Where the answer stands after the thinking, and how long the scorers of a batch may take.

    An answer on which the library's scorer raises, hangs or uses up its memory has score 0; one whose turn does not
    come abstains.
    """

    answer_in: str = "tag"  # the last <answer>…</answer> (tag), the last box (boxed), or the whole text (text)
    batch_deadline_s: float = 300.0  # of a rank's batch

    def __post_init__(self) -> None:
        require_one_of(("tag", "boxed", "text"), "reward.answer_in", self.answer_in)
        require(self.batch_deadline_s > 0, f"reward.batch_deadline_s={self.batch_deadline_s}: must be > 0 seconds")

    def longest_wait_s(self) -> float:
        return self.batch_deadline_s


def score(entry: list[Any], answer: str) -> float:
    """In the sandbox: the score of an answer to the problem that is made again from ``entry``."""
    made, problem = entry_of({ENTRY: entry})
    return float(made.score_answer(answer, problem))


def prepare() -> None:
    """In the sandbox, before it takes items: the import, which takes seconds."""
    import reasoning_gym  # noqa: F401  # pyright: ignore[reportMissingImports]


def answer_in(text: str, place: str) -> str | None:
    """The answer in a completion; None where there is none."""
    rest, _ = after_thinking(text)
    if rest is None or place == "text":
        return rest.strip() if rest else None
    if place == "boxed":
        return last_boxed(rest)
    found = _TAGGED.findall(rest)
    return found[-1].strip() if found else None


def _pool() -> Pool:
    limits = Limits(memory_mib=2048, cpu_s=2000 * int(ITEM_S), processes=1)
    return shared_pool(
        TARGET, lambda: Pool(TARGET, deadline_s=ITEM_S, item_cpu_s=ITEM_S, prepare="prepare", limits=limits)
    )


def _value(reply: ChildReply) -> float | None:
    if reply.status == "ok":
        return reply.value if math.isfinite(reply.value) else 0.0
    return None if reply.status in ("skipped", "died") else 0.0


@register("reward", "reasoning_gym", ReasoningGymRewardConfig)
def reasoning_gym_scores(groups: Sequence[Group], config: ReasoningGymRewardConfig, context: Context) -> Scores:
    """0 without an answer, else the library's score in [0, 1]; equal answers to a problem are scored once."""
    for group in groups:
        if ENTRY not in group.prompt.problem.meta:
            raise RunError(
                f"reward reasoning_gym: problem {group.prompt.problem.id} is not of data=reasoning_gym; choose that "
                "data, or another reward"
            )
    answers = [[answer_in(each.text, config.answer_in) for each in group.completions] for group in groups]
    items = [
        (group.prompt.problem.meta[ENTRY], answer)
        for group, row in zip(groups, answers, strict=True)
        for answer in row
        if answer is not None and len(answer) <= MAX_CHARACTERS
    ]
    replies = iter(_pool().map(items, deadline_s=config.batch_deadline_s))
    scored = [
        [next(replies) if answer is not None and len(answer) <= MAX_CHARACTERS else None for answer in row]
        for row in answers
    ]
    statuses = [reply.status for row in scored for reply in row if reply is not None]
    failed = [float(status != "ok") for status in statuses]
    return Scores(
        scores=[[0.0 if reply is None else _value(reply) for reply in row] for row in scored],
        metrics={"reasoning_gym/scorer_failed": Mean.of(failed)} if failed else {},
    )
