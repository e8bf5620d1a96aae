"""What every estimator does with the ids of an environment: no advantage, in no statistic, and no other effect."""

import dataclasses

import pytest
import torch
from turned_groups import FIRST_OBSERVED, ByWritten, Words, alone, group_of, logprob, spoken

from rltrain.advantages.custom import UserEstimatorConfig
from rltrain.advantages.estimator import estimator_of
from rltrain.advantages.ktae import end_ids
from rltrain.advantages.spae_steps import split_steps
from rltrain.advantages.verl_function import verl_batch
from rltrain.advantages.vineppo import step_borders
from rltrain.registry import discover, parts
from rltrain.types import Advantages, Context, TokenEntropy, Turn

discover()

TOKENIZER = Words()
OF_TURNS = {"mt_grpo", "gigpo"}  # they compare turns, so that turns are no detail to them
SETTINGS = {
    "hicra": [{"phrases": ["wait"]}],
    "entropy_mask": [{"share": 0.4}],
    "gtpo": [{}, {"mean_over": "batch"}],
    "group": [{}, {"baseline": "leave_one_out", "scale": "none", "prefix_scale": True}],
    "optimal_token_baseline": [{}, {"leave_one_out": True}],
    "regression": [{}, {"weight": "exact", "running_sum": True}],
    "spae": [{"delimiter": "\n"}, {"delimiter": "\n", "whiten": False}],
    "tree_po": [{}, {"depths": "tokens"}],
    "vineppo": [{"delimiter": "\n", "draws": 4}],
    "spo": [{"interval": 1, "threshold": 0.8, "draws": 4}],
    "opd": [{}, {"max_drop": 0.01}],
}
CASES = {
    f"{part.name}{options or ''}": (part.name, options)
    for part in parts("advantage")
    if not issubclass(part.config, UserEstimatorConfig)
    for options in SETTINGS.get(part.name, [{}])
}


def observation(before):
    """An environment's answer: a function of what stands before it, of one to three ids."""
    return tuple(FIRST_OBSERVED + (sum(before) + 7 * place) % 50 for place in range(1 + sum(before) % 3))


def talk(*turns, reward=0.0):
    """A completion whose turns are answered by :func:`observation`, the last of them excepted."""
    parts = [turns[0]]
    for own in turns[1:]:
        before = [token for part in parts for token in part]
        parts += [observation(before), own]
    return spoken(*parts, rewards=[reward] * len(turns), keys=[str(k) for k in range(len(turns))], text="x")


# Turns end in 6, which ends a step. A completion of one turn, and one that ends in an observation, are among them.
GROUPS = [
    group_of(
        [talk([5, 8, 6], [7, 6], [9]), talk([5, 8, 6], [7, 5], reward=1.0), talk([5, 6], [9, 9, 5]), talk([8, 5])],
        [1.0, 0.0, 0.25, None],
        name="a",
    ),
    group_of(
        [talk([5, 6], [8, 6], [5]), talk([5, 6], [8, 6], [7]), spoken([9, 6], [120, 121], keys=["0"])],
        [1.0, 0.0, 0.0],
        name="b",
    ),
    group_of([talk([7, 6], [8]), talk([7, 6], [9, 5])], [0.5, 0.5], name="c"),
]
ALONE = [dataclasses.replace(group, completions=tuple(map(alone, group.completions))) for group in GROUPS]


def estimated(case, groups, services=None):
    name, options = CASES[case]
    context, estimator = (services or ByWritten(TOKENIZER)).context(), estimator_of(name, options)
    estimator(groups, context)  # what keeps state has learnt from this batch by the second call
    return estimator(groups, context)


def at_written(advantages, groups):
    return [
        [value for value, token in zip(row_T.tolist(), one.token_ids, strict=True) if token < FIRST_OBSERVED]
        for rows, group in zip(advantages.values, groups, strict=True)
        for row_T, one in zip(rows, group.completions, strict=True)
    ]


@pytest.mark.parametrize("case", CASES)
def test_an_observed_id_has_no_advantage_and_a_written_one_a_finite_one(case):
    for rows, group in zip(estimated(case, GROUPS).values, GROUPS, strict=True):
        for row_T, one in zip(rows, group.completions, strict=True):
            written_T = torch.tensor(one.written_T)
            assert row_T[~written_T].tolist() == [0.0] * int((~written_T).sum())
            assert row_T.isfinite().all()


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] not in OF_TURNS])
def test_advantages_and_metrics_are_those_of_the_written_ids_alone(case):
    """Where an observation is a function of what stands before it, and a border of turns one of steps."""
    found, expected = estimated(case, GROUPS), estimated(case, ALONE)
    for row, other in zip(at_written(found, GROUPS), at_written(expected, ALONE), strict=True):
        assert row == pytest.approx(other, abs=1e-12)
    assert any(value for row in at_written(expected, ALONE) for value in row)
    assert found.metrics.keys() == expected.metrics.keys()
    for name, metric in found.metrics.items():
        if not name.startswith("timing_s/"):
            assert dataclasses.astuple(metric) == pytest.approx(dataclasses.astuple(expected.metrics[name])), name


@pytest.mark.parametrize("case", CASES)
def test_what_stands_at_observed_ids_changes_nothing(case):
    """Other ids in the observations, one for one, and an entropy there: the same bits."""
    renamed = [
        dataclasses.replace(
            group,
            completions=tuple(
                dataclasses.replace(
                    one, token_ids=tuple(t if t < FIRST_OBSERVED else 3 * FIRST_OBSERVED - t for t in one.token_ids)
                )
                for one in group.completions
            ),
        )
        for group in GROUPS
    ]
    found = estimated(case, renamed, ByWritten(TOKENIZER, observed_entropy=9.0))
    assert [row_T.tolist() for rows in found.values for row_T in rows] == [
        row_T.tolist() for rows in estimated(case, GROUPS).values for row_T in rows
    ]


def test_the_steps_of_turns_by_hand():
    """Two turns of six and five written ids, each with an observation of two that holds a close and a delimiter."""
    texts = ["a", "b.", "c", "d.", "</think>", "e.", "</think>", ".", "f.", "g", "h.", "</think>", "x", ".", "."]
    turns = [Turn(written=6, observed=2), Turn(written=5, observed=2)]
    steps = split_steps(texts, delimiter=".", close="</think>", max_steps=64, turns=turns)
    assert steps.cuts == (2, 4, 9, 11)  # not e., behind the first close; f. and h. before the second
    assert steps.tail_tokens == 4
    assert steps.think_spans == ((0, 4), (8, 11))
    assert [steps.think_tokens_behind(cut) for cut in (0, 2, 9)] == [7, 5, 2]
    ends_with_turn = [Turn(written=2, observed=1), Turn(written=1)]
    (first, *_) = split_steps(["a", "b.", "o", "c"], delimiter=".", close="</", max_steps=9, turns=ends_with_turn).cuts
    assert first == 3  # behind the reply to the turn that it ends


def test_the_borders_of_vineppos_steps_have_a_written_token_behind_them():
    texts = [Words().word(token) for token in range(200)]
    completion = spoken([5, 6, 7, 6], [120, 121], [6, 9], [130], [5])
    assert step_borders(completion, texts, "\n") == [2, 6, 7, 9]
    assert step_borders(spoken([5, 6], [120]), texts, "\n") == []  # nothing is written behind it
    assert step_borders(alone(completion), texts, "\n") == [2, 4, 5]


def test_token_t_of_the_optimal_token_baseline_is_the_tth_written_one():
    """Norms 1 and 2 in completion 0, 3 and 1 in completion 1, whose observation is longer.

    B_0 = (1·1 + 3·0)/(1 + 3), B_1 = (3·1 + 4·0)/(3 + 4).
    """
    group = group_of([spoken([3], [100], [6]), spoken([3], [100, 101, 102], [6])], [1.0, 0.0])
    p = torch.tensor(logprob(3), dtype=torch.float64).exp()
    collisions = [[1.0, 0.0, 2.0], [3.0, 9.0, 9.0, 9.0, 1.0]]  # of which 1 - 2 p is taken off, so that norms are those

    def entropy(groups):
        norms = [torch.tensor(row, dtype=torch.float64) for row in collisions]
        return [[TokenEntropy(entropy_T=row_T, collision_T=row_T - 1 + 2 * p) for row_T in norms]]

    (rows,) = estimator_of("optimal_token_baseline")([group], Context(entropy=entropy)).values
    assert rows[0].tolist() == pytest.approx([1 - 1 / 4, 0.0, 1 - 3 / 7], abs=1e-6)
    assert rows[1].tolist() == pytest.approx([-1 / 4, 0.0, 0.0, 0.0, -3 / 7], abs=1e-6)


def test_special_tokens_at_the_end_of_a_turn_are_ends():
    """3 is special: the end of an answered turn, an observation, and the inside of a turn."""
    groups = [group_of([spoken([5, 3], [100, 100], [6, 5], finish="length")], [1.0])]
    assert end_ids(groups, Words()) == {3}
    assert end_ids([group_of([spoken([3, 5], [100], [3, 6])], [1.0])], Words()) == set()


def test_verls_batch_marks_written_ids_and_rewards_the_last_of_them():
    group = group_of([spoken([5, 6], [100], [7]), spoken([5], [100, 101]), spoken([], [100])], [1.0, 0.5, 1.0])
    batch, places = verl_batch([group])
    assert places == [(0, 0), (0, 1)]
    assert batch.response_mask_BT.tolist() == [[1, 1, 0, 1], [1, 0, 0, 0]]
    assert batch.token_level_rewards_BT.tolist() == [[0, 0, 0, 1], [0.5, 0, 0, 0]]


def test_a_function_of_a_user_may_return_anything_at_observed_ids():
    def everywhere(groups, options, context):
        rows = [[torch.tensor(one.written_T).double() for one in group.completions] for group in groups]
        return Advantages(values=[[options["value"] / row_T for row_T in of_group] for of_group in rows])

    group = group_of([spoken([5, 6], [100], [7])], [1.0])
    (rows,) = estimator_of(everywhere, {"value": 2.0})([group], Context()).values
    assert rows[0].tolist() == [2.0, 2.0, 0.0, 2.0]  # inf stood there
