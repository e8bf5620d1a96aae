"""Rewards of length and repetition: soft overlong penalty, cosine schedule, n-gram repetition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rltrain.config import RewardConfig
from rltrain.errors import require
from rltrain.registry import register
from rltrain.rewards.math import verify
from rltrain.types import Completion, Context, Group, Scores


@dataclass(kw_only=True)
class OverlongConfig(RewardConfig):
    """See :func:`soft_overlong_penalty`.

    ``max_tokens=0`` takes the sampling limit, ``cache_tokens=0`` a fifth of that (the paper's 4,096 of 20,480).
    """

    max_tokens: int = 0
    cache_tokens: int = 0

    def __post_init__(self) -> None:
        require(
            self.cache_tokens >= 0, f"reward.cache_tokens={self.cache_tokens}: must be >= 0; 0 is a fifth of the limit"
        )
        require(
            self.max_tokens == 0 or self.cache_tokens <= self.max_tokens,
            f"reward.cache_tokens={self.cache_tokens}: wider than max_tokens={self.max_tokens}; lower it",
        )


def soft_overlong_penalty(length_tokens: int, *, max_tokens: int, cache_tokens: int) -> float:
    """DAPO (arXiv 2503.14476): 0 up to ``L_max - L_cache``, then ``((L_max - L_cache) - length)/L_cache``, -1 above
    ``L_max``.

    Lengths in tokens, EOS included.
    """
    start = max_tokens - cache_tokens
    return max(-1.0, min(0.0, (start - length_tokens) / cache_tokens))


@register("reward", "overlong", OverlongConfig)
def overlong(groups: Sequence[Group], config: OverlongConfig, context: Context) -> Scores:
    """The soft overlong penalty of each completion, over all its ids, an environment's too, as the limit counts."""
    limit = config.max_tokens or context.max_new_tokens
    cache = config.cache_tokens or max(1, limit // 5)
    require(
        cache <= limit, f"reward.cache_tokens={cache}: wider than the limit of {limit} tokens; set it in (0, {limit}]"
    )
    return Scores(
        scores=[
            [soft_overlong_penalty(length, max_tokens=limit, cache_tokens=cache) for length in lengths]
            for lengths in ([len(completion.token_ids) for completion in group.completions] for group in groups)
        ]
    )


@dataclass(kw_only=True)
class CosineConfig(RewardConfig):
    """See :func:`cosine_length`. ``right_*`` and ``wrong_*`` are the rewards at length 0 and at ``max_tokens``."""

    max_tokens: int = 0
    right_short: float = 2.0  # of a right answer of length 0
    right_long: float = 1.0  # of a right answer of max_tokens
    wrong_short: float = -10.0  # of a wrong answer of length 0
    wrong_long: float = 0.0  # of a wrong answer of max_tokens
    exceed: float = -10.0  # of a completion that reached max_tokens

    def __post_init__(self) -> None:
        require(self.max_tokens >= 0, f"reward.max_tokens={self.max_tokens}: must be >= 0; 0 takes the sampling limit")


def cosine_length(length_tokens: int, *, at_zero: float, at_limit: float, limit_tokens: int) -> float:
    """``at_limit + (at_zero - at_limit)(1 + cos(pi·length/limit))/2`` (arXiv 2502.03373), length in tokens."""
    return at_limit + 0.5 * (at_zero - at_limit) * (1 + math.cos(math.pi * length_tokens / limit_tokens))


@register("reward", "cosine_length", CosineConfig)
def cosine(groups: Sequence[Group], config: CosineConfig, context: Context) -> Scores:
    """Short right answers get the highest reward, short wrong answers the lowest.

    A completion cut at the limit, which counts all ids, gets ``exceed``. The length that the schedule takes is that of
    the ids which the model wrote. Abstains where the verifier does.
    """
    limit = config.max_tokens or context.max_new_tokens
    require(limit > 0, "reward.max_tokens=0: the sampling limit is unknown here; set reward.max_tokens")

    def reward(completion: Completion, gold: str) -> float | None:
        if len(completion.token_ids) >= limit:
            return config.exceed
        right = verify(completion.text, gold).score
        if right is None:
            return None
        ends = (config.right_short, config.right_long) if right else (config.wrong_short, config.wrong_long)
        return cosine_length(completion.written_tokens, at_zero=ends[0], at_limit=ends[1], limit_tokens=limit)

    return Scores(
        scores=[
            [reward(completion, group.prompt.problem.answer) for completion in group.completions] for group in groups
        ]
    )


@dataclass(kw_only=True)
class RepetitionConfig(RewardConfig):
    """See :func:`repetition_penalty`."""

    ngram: int = 3  # tokens of an n-gram
    max_penalty: float = -1.0  # where every n-gram is repeated

    def __post_init__(self) -> None:
        require(self.ngram >= 1, f"reward.ngram={self.ngram}: must be >= 1")
        require(self.max_penalty <= 0, f"reward.max_penalty={self.max_penalty}: must be <= 0")


def repetition_penalty(*spans: Sequence[int], ngram: int, max_penalty: float) -> float:
    """``max_penalty·(1 - distinct n-grams / n-grams)`` over the token ids of all spans, 0 without an n-gram.

    No n-gram reaches from one span into the next.
    """
    grams = [gram for ids in spans for gram in zip(*(ids[offset:] for offset in range(ngram)), strict=False)]
    return max_penalty * (1 - len(set(grams)) / len(grams)) if grams else 0.0


@register("reward", "repetition", RepetitionConfig)
def repetition(groups: Sequence[Group], config: RepetitionConfig, context: Context) -> Scores:
    """The repetition penalty of each completion, over the ids that the model wrote."""
    return Scores(
        scores=[
            [
                repetition_penalty(
                    *(one.token_ids[start:stop] for start, stop in one.written_spans),
                    ngram=config.ngram,
                    max_penalty=config.max_penalty,
                )
                for one in group.completions
            ]
            for group in groups
        ]
    )
