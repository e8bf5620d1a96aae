"""``context.grade``: texts, abstentions, and what it must leave as it was."""

from dataclasses import dataclass, replace

import pytest
import torch
from local_engine import ALPHABET, EOS, tokenizer

from rltrain.config import RewardConfig
from rltrain.errors import ConfigError
from rltrain.registry import register
from rltrain.rewards import failures
from rltrain.rewards.grading import RunGrader
from rltrain.rollout.continuation_types import ContinuationRequest
from rltrain.rollout.stopping import StopRule
from rltrain.runs.part_states import PartStates, copies
from rltrain.types import Completion, Context, Group, Need, Problem, Prompt, Scores

RULE = StopRule(stop_ids={EOS}, stop_strings=(), max_new_tokens=8, tokenizer=tokenizer())


@dataclass(kw_only=True)
class LengthOfTextConfig(RewardConfig):
    """Fails on the text ``bad``."""


@register("reward", "length_of_text", LengthOfTextConfig, needs={Need.STATE})
def length_of_text(groups, config, context):
    """Abstains on the empty text, and counts its calls."""
    context.state["calls"] = context.state.get("calls", torch.tensor(0)) + 1
    return Scores(scores=[[len(one.text) or None for one in group.completions] for group in groups])


@dataclass(kw_only=True)
class AsksAgainConfig(RewardConfig):
    """A reward that continues, or grades, what it is given."""

    grades: bool = False


@register("reward", "asks_again", AsksAgainConfig, needs={Need.CONTINUATIONS})
def asks_again(groups, config, context):
    return context.grade(groups) if config.grades else context.rollout.continue_([])


def encode(text):
    return tuple(ALPHABET.index(character) + 3 for character in text)


def completion(ids):
    return Completion(token_ids=ids, logprobs=(0.0,) * len(ids), finish="length")


GROUP = Group(
    prompt=Prompt(problem=Problem(id="p", prompt="", answer=""), token_ids=(5,)),
    completions=tuple(completion(ids) for ids in (encode("abc"), (EOS,), (*encode("12"), EOS))),
)


def grader(rewards, states=None, context=None):
    states = states or PartStates()
    context = context or Context(state_of=states.of)
    return RunGrader(rewards=rewards, context=context, rule=RULE, state_of=copies(states.of))


def test_rewards_read_the_text_of_all_ids_and_may_abstain():
    (graded,) = grader({"length": LengthOfTextConfig(weight=2.0)})([GROUP])
    assert [one.text for one in graded.completions] == ["abc", "", "12"]
    torch.testing.assert_close(graded.rewards_G, torch.tensor([6.0, torch.nan, 4.0]).double(), equal_nan=True)
    assert graded.reward_parts["length"].nan_to_num(-1).tolist() == [3, -1, 2]


def test_a_continued_completion_has_the_ids_and_log_probs_of_both():
    first, new = (
        completion(encode("abcd")),
        Completion(token_ids=(*encode("xy"), EOS), logprobs=(-1.0,) * 3, finish="stop"),
    )
    joined = first.continued(2, new)
    assert joined.token_ids == (*encode("abxy"), EOS)
    assert joined.logprobs == (0.0, 0.0, -1.0, -1.0, -1.0) and joined.finish == "stop"


def test_states_and_noted_failures_stay_as_they_were():
    states = PartStates()
    states.of("rewards/length")["calls"] = torch.tensor(7)
    failures.note("length", "broken before")
    grader({"length": LengthOfTextConfig()}, states)([GROUP])
    assert int(states.of("rewards/length")["calls"]) == 7
    with pytest.raises(failures.RewardError, match="broken before"):
        failures.refuse_broken(["length"])
    failures.note("length", "")


@pytest.mark.parametrize("grades", [False, True])
def test_a_reward_that_continues_does_not_grade_continuations(grades):
    with pytest.raises(ConfigError, match="^a reward that asks for continuations cannot grade those of another part"):
        grader({"again": AsksAgainConfig(grades=grades)})([GROUP])


def test_no_group_gives_none():
    assert grader({"length": LengthOfTextConfig()})([]) == []


def test_a_request_says_where_it_is():
    request = ContinuationRequest(
        problem_id="p", sample_index=0, prompt_ids=(5,), completion_ids=(6, 7), draws=1, max_new_tokens=1
    )
    assert (request.position, request.prefix_ids) == (2, (5, 6, 7))
    assert replace(request, completion_ids=()).position == 0
