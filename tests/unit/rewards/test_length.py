"""Length rewards against hand-computed numbers."""

import math

import pytest

from rltrain.errors import ConfigError
from rltrain.rewards.length import (
    CosineConfig,
    OverlongConfig,
    RepetitionConfig,
    cosine,
    cosine_length,
    overlong,
    repetition,
    repetition_penalty,
    soft_overlong_penalty,
)
from rltrain.types import Completion, Context, Group, Problem, Prompt


def group(lengths, texts=None, gold="5"):
    texts = texts or [""] * len(lengths)
    completions = tuple(
        Completion(token_ids=tuple(range(length)), logprobs=(0.0,) * length, finish="stop", text=text)
        for length, text in zip(lengths, texts, strict=True)
    )
    return Group(
        prompt=Prompt(problem=Problem(id="p", prompt="q", answer=gold), token_ids=(1,)), completions=completions
    )


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1), (500, -1)]
)
def test_soft_overlong_is_dapos_ramp(length, penalty):
    assert soft_overlong_penalty(length, max_tokens=100, cache_tokens=20) == pytest.approx(penalty, abs=1e-12)


def test_overlong_reward_takes_the_sampling_limit():
    assert overlong([group([80, 90, 100])], OverlongConfig(cache_tokens=20), Context(max_new_tokens=100)).scores == [
        [0, -0.5, -1]
    ]
    with pytest.raises(ConfigError, match="wider than the limit of 10"):
        overlong([group([1])], OverlongConfig(cache_tokens=20), Context(max_new_tokens=10))
    with pytest.raises(ConfigError, match="wider than max_tokens=10"):
        OverlongConfig(max_tokens=10, cache_tokens=20)


def test_cosine_runs_from_one_end_to_the_other():
    assert cosine_length(0, at_zero=2, at_limit=1, limit_tokens=100) == 2
    assert cosine_length(50, at_zero=2, at_limit=1, limit_tokens=100) == pytest.approx(1.5)
    assert cosine_length(100, at_zero=2, at_limit=1, limit_tokens=100) == pytest.approx(1)
    assert cosine_length(25, at_zero=0, at_limit=-10, limit_tokens=100) == pytest.approx(-10 + 5 * (1 + math.sqrt(0.5)))


def test_cosine_reward_of_right_wrong_cut_and_ungradeable():
    right, wrong = r"\boxed{5}", r"\boxed{6}"
    config = CosineConfig(max_tokens=100)
    scores = cosine(
        [group([50, 50, 100], [right, wrong, right]), group([5], [right], gold="see figure")], config, Context()
    )
    assert scores.scores == [[pytest.approx(1.5), pytest.approx(-5.0), -10.0], [None]]


def test_repetition_is_the_share_of_repeated_ngrams():
    assert repetition_penalty([1, 2, 3, 4], ngram=2, max_penalty=-1) == 0
    assert repetition_penalty([1, 1, 1, 1, 1], ngram=2, max_penalty=-1) == pytest.approx(-0.75)
    assert repetition_penalty([1, 2, 1, 2, 1], ngram=2, max_penalty=-0.5) == pytest.approx(-0.25)
    assert repetition_penalty([1], ngram=2, max_penalty=-1) == 0
    assert repetition([group([4, 0])], RepetitionConfig(), Context()).scores == [[0.0, 0.0]]


def test_overlong_cache_is_a_fifth_of_the_limit_unless_given():
    assert overlong([group([80, 90])], OverlongConfig(), Context(max_new_tokens=100)).scores == [[0, -0.5]]
