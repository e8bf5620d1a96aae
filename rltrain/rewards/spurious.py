"""Spurious rewards for control runs (arXiv 2507.10532): a gain under them does not come from the right answers.

On data that no model has seen, accuracy should rise under the right reward, not under random and majority-wrong
rewards, and fall under the inverted reward.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from rltrain.config import MISSING, RewardConfig
from rltrain.data.boxed import last_boxed
from rltrain.errors import require
from rltrain.registry import Part, parts, register
from rltrain.rewards.random_calculation import parse_literal
from rltrain.types import Context, Group, Mean, Scores


@dataclass(kw_only=True)
class RandomRewardConfig(RewardConfig):
    """See :func:`random_reward`."""

    probability: float = 0.5  # of a reward of 1

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, f"reward.probability={self.probability}: must lie in [0, 1]")


def coin(probability: float, *key: Hashable) -> float:
    """1.0 with the given probability, else 0.0: a pure function of the key."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") < probability * 2**64)


@register("reward", "random", RandomRewardConfig)
def random_reward(groups: Sequence[Group], config: RandomRewardConfig, context: Context) -> Scores:
    """Bernoulli(``probability``), a pure function of (seed, step, problem id, sample index)."""
    return Scores(
        scores=[
            [
                coin(config.probability, context.seed, context.step, group.prompt.problem.id, sample)
                for sample in range(len(group.completions))
            ]
            for group in groups
        ]
    )


@dataclass(kw_only=True)
class BasedOnRewardConfig(RewardConfig):
    """A control made from the right reward: ``base`` names it, ``options`` are its config fields."""

    base: str = MISSING
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {part.name for part in parts("reward") if not issubclass(part.config, BasedOnRewardConfig)}
        require(
            self.base in known,
            f"reward.base={self.base}: not a reward to build on; choose from {', '.join(sorted(known))}",
        )
        keys = sorted(entry.name for entry in fields(self._base.config))
        for name in self.options:
            require(name in keys, f"reward.options.{name}: {self.base} has no such key; its keys are {', '.join(keys)}")
        self._base.config(**self.options)

    @property
    def _base(self) -> Part:
        return next(part for part in parts("reward") if part.name == self.base)

    def right_scores(self, groups: Sequence[Group], context: Context) -> Scores:
        """The right reward of every completion."""
        return self._base.function(groups, self._base.config(**self.options), context)


@dataclass(kw_only=True)
class InvertedRewardConfig(BasedOnRewardConfig):
    """See :func:`inverted_reward`."""


@register("reward", "inverted", InvertedRewardConfig)
def inverted_reward(groups: Sequence[Group], config: InvertedRewardConfig, context: Context) -> Scores:
    """``1 - r`` for the right reward r. It abstains where r does. The metrics are those of the right reward."""
    right = config.right_scores(groups, context)
    scores = [[None if score is None else 1.0 - score for score in scores_G] for scores_G in right.scores]
    return Scores(scores=scores, metrics=right.metrics)


@dataclass(kw_only=True)
class MajorityWrongRewardConfig(BasedOnRewardConfig):
    """``right_at``: the majority answer counts as right if the right reward is at least this."""

    right_at: float = 1.0


def _answer(text: str) -> Hashable | None:
    boxed = last_boxed(text)
    if not boxed:
        return None
    number = parse_literal(boxed)
    return boxed if number is None else number


@register("reward", "majority_wrong", MajorityWrongRewardConfig)
def majority_wrong_reward(groups: Sequence[Group], config: MajorityWrongRewardConfig, context: Context) -> Scores:
    """1 for the group's majority answer, else 0, in groups whose majority answer is wrong. Other groups abstain.

    Answers are the last boxes, numbers compared by value. Of equally frequent answers the first is the majority. A
    group without any answer abstains. Metric ``majority_wrong`` is the share of groups that do not abstain.
    """
    right = config.right_scores(groups, context)
    scores: list[list[float | None]] = []
    for group, right_G in zip(groups, right.scores, strict=True):
        answers = [_answer(completion.text) for completion in group.completions]
        counts = Counter(answer for answer in answers if answer is not None)
        majority = max(counts, key=counts.__getitem__) if counts else None
        verdict = None if majority is None else right_G[answers.index(majority)]
        if verdict is None or verdict >= config.right_at:
            scores.append([None] * len(answers))
        else:
            scores.append([float(answer == majority) for answer in answers])
    applies = [scores_G[0] is not None for scores_G in scores]
    return Scores(scores=scores, metrics={**right.metrics, "majority_wrong": Mean.of(applies)})
