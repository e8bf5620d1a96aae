"""Completions of several turns: which ids are the model's, what the constructor refuses, and how a prefix goes on."""

import math
import pickle
from dataclasses import replace

import pytest

from rltrain.types import Completion, Turn, UnknownLogprobs, among_observed, turns_before, written_mask

NAN = math.nan
TURNS = (
    Turn(written=2, observed=3, reward=0.5, state_key="a", called=True, text="ab", reply="[6]"),
    Turn(written=2, state_key="b", text="c"),
)
MASK = (True, True, False, False, False, True, True)
TALK = Completion(
    token_ids=(10, 11, 20, 21, 22, 12, 1),
    logprobs=(-0.1, -0.2, NAN, NAN, NAN, -0.3, -0.4),
    finish="stop",
    text="c",
    entropies=((0.1, 0.9), (0.2, 0.8), (NAN, NAN), (NAN, NAN), (NAN, NAN), (0.3, 0.7), (0.4, 0.6)),
    turns=TURNS,
)


def test_the_mask_of_a_completion_is_that_of_its_turns():
    assert TALK.written_T == written_mask(TURNS) == MASK
    assert TALK.written_tokens == 4
    assert TALK.transcript == "ab[6]c"
    assert pickle.loads(pickle.dumps(TALK)).turns == TURNS


def test_without_turns_the_model_wrote_every_id():
    completion = Completion(token_ids=(1, 2), logprobs=(NAN, -1.0), finish="stop", text="x")
    assert completion.written_T == (True, True)
    assert (completion.written_tokens, completion.transcript, completion.failed) == (2, "x", "")


def test_values_of_written_ids_stand_among_the_observed():
    assert among_observed([1, 2, 3, 4], TURNS, 0) == (1, 2, 0, 0, 0, 3, 4)
    assert replace(TALK, logprobs=among_observed((-0.1, -0.2, -0.3, -0.4), TURNS, NAN)) == TALK
    with pytest.raises(ValueError, match="among_observed: 3 values for 4 written ids; give one per written id"):
        among_observed([1, 2, 3], TURNS, 0)


REFUSED = {
    "the turns are shorter": (
        {"turns": TURNS[:1]},
        "Completion: turns of 5 ids but 7 token ids; written and observed ids of the turns add up to all ids",
    ),
    "a log-prob of an observed id": (
        {"logprobs": (-0.1, -0.2, NAN, -9.0, NAN, -0.3, -0.4)},
        "Completion: log-prob -9.0 of id 3, which an environment wrote; give NaN",
    ),
    "no log-prob of a written id": (
        {"logprobs": (-0.1, NAN, NAN, NAN, NAN, -0.3, -0.4)},
        "Completion: log-prob nan of id 1, which the model wrote; it must be finite",
    ),
    "an entropy of an observed id": (
        {"entropies": (*TALK.entropies[:4], (0.5, NAN), *TALK.entropies[5:])},
        "Completion: entropy 0.5 of id 4, which an environment wrote; give NaN",
    ),
    "no collision probability of a written id": (
        {"entropies": (*TALK.entropies[:6], (0.4, NAN))},
        "Completion: collision nan of id 6, which the model wrote; it must be finite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_constructor_refuses(case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        replace(TALK, **changes)
    assert str(caught.value) == message


def test_log_probs_that_nobody_kept_are_not_checked():
    assert replace(TALK, logprobs=UnknownLogprobs(reason="a table"), entropies=None).written_tokens == 4


@pytest.mark.parametrize(
    ("values", "message"), [({"written": -1}, "-1 written"), ({"written": 1, "reward": NAN}, "nan")]
)
def test_a_turn_has_counts_and_a_finite_reward(values, message):
    with pytest.raises(ValueError, match=message):
        Turn(**values)


CUTS = {
    0: (),
    1: (Turn(written=1, state_key="a"),),
    2: (Turn(written=2, state_key="a"),),
    4: (Turn(written=2, observed=2, state_key="a"),),
    5: TURNS[:1],
    6: (TURNS[0], Turn(written=1, state_key="b")),
    7: TURNS,
}


@pytest.mark.parametrize("position", CUTS)
def test_the_turns_of_a_prefix(position):
    assert turns_before(TURNS, position) == CUTS[position]


def test_a_continuation_goes_on_with_the_turn_that_it_cuts():
    new = Completion(token_ids=(13, 23, 14), logprobs=(-0.5, NAN, -0.6), finish="length")
    new = replace(new, turns=(Turn(written=1, observed=1, reward=2.0, text="d", reply="!"), Turn(written=1, text="e")))
    joined = TALK.continued(6, new)
    assert joined.token_ids == (10, 11, 20, 21, 22, 12, 13, 23, 14)
    assert joined.turns == (TURNS[0], replace(new.turns[0], written=2, state_key="b"), new.turns[1])
    assert [value for value in joined.logprobs if value == value] == [-0.1, -0.2, -0.3, -0.5, -0.6]


def test_a_continuation_after_an_observation_is_a_turn_of_its_own():
    new = Completion(token_ids=(13, 1), logprobs=(-0.5, -0.6), finish="stop")
    assert TALK.continued(5, new).turns == (TURNS[0], Turn(written=2))
    plain = Completion(token_ids=(1, 2), logprobs=(0.0, 0.0), finish="stop")
    assert plain.continued(1, new).turns == ()
    assert plain.continued(1, TALK).turns == (replace(TURNS[0], written=3), TURNS[1])
