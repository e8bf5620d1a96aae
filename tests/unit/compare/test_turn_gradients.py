"""The bench over turns: a family whose policy reads a reply, and exact gradients of estimators on a small one."""

import math

import numpy as np
import pytest
import torch
from enumerated_gradients import expected_gradient

from rltrain.advantages.estimator import estimator_of
from rltrain.compare.gradients import FAMILIES, Family
from rltrain.compare.gradients.__main__ import main
from rltrain.compare.gradients.families import FACT, NOTHING, TableReply, enumerated
from rltrain.compare.gradients.judging import Sampling, judge_on, policy_of
from rltrain.compare.gradients.rows import contenders
from rltrain.compare.gradients.services import ExactEntropies, Table, turns_behind
from rltrain.registry import discover
from rltrain.rollout.continuation_types import ContinuationRequest
from rltrain.types import Context, SpanRequest, Turn

TOOL = FAMILIES[-1]
RIGHT = (0, 1, 1, FACT, 0, 2, 1)
CALL = (0.3, 0.4, 0.3, 0.0)
ANSWERS = {FACT: (0.1, 0.9, 0.0, 0.0), NOTHING: (0.5, 0.2, 0.3, 0.0)}


def reply(prefix):
    right = prefix[0] == 1
    answered = TableReply(ids=(FACT if right else NOTHING,), reward=float(right), key="told" if right else "not told")
    return answered if len(prefix) == 1 else None


# A call, its reply, an answer: 8 completions.
SMALL = Family(
    name="small",
    says="",
    length=3,
    correct=lambda ids: ids[2] == 1,
    row=lambda prefix: CALL if not prefix else ANSWERS[prefix[1]],
    reply=reply,
)


@pytest.fixture(autouse=True, scope="module")
def registered():
    discover()


@pytest.fixture(scope="module")
def small():
    return enumerated(SMALL, 0)


def test_the_family_is_what_it_says():
    """0.4·0.9 + 0.6·0.2 = 0.48. A right call is worth 0.9, another 0.2, before and after the reply."""
    policy = policy_of(TOOL, 0)
    assert policy.expected_reward == pytest.approx(0.48, abs=1e-12)
    assert len(policy.completions) == 3**4 * 3 * 3
    for call, observed, value in ((1, FACT, 0.9), (0, NOTHING, 0.2)):
        assert policy.values[0, 0, call] == policy.values[0, 0, call, observed] == pytest.approx(value)
    completion = next(one for one in policy.sampled if one.token_ids == RIGHT)
    assert completion.turns == (
        Turn(written=3, observed=1, reward=1.0, state_key="start", called=True),
        Turn(written=3, state_key="told"),
    )
    assert completion.written_logprobs == pytest.approx(np.log([0.7, 0.15, 0.4, 0.7, 0.15, 0.9]))
    assert math.isnan(completion.logprobs[3])


def test_the_services_know_which_tokens_were_observed():
    context = Table(policy=policy_of(TOOL, 0), seed=0).context
    request = {"problem_id": "p", "sample_index": 0, "prompt_ids": (1,), "draws": 2, "max_new_tokens": 9}
    (early, late) = context.rollout.continue_(
        [
            ContinuationRequest(completion_ids=RIGHT[:2], **request),
            ContinuationRequest(completion_ids=RIGHT[:4], **request),
        ]
    )
    assert [[turn.written for turn in one.turns] for one in early] == [[1, 3]] * 2
    assert [[turn.written for turn in one.turns] for one in late] == [[3]] * 2
    assert {one.turns[-1].state_key for one in late} == {"told"}
    assert turns_behind([Turn(written=3, observed=1), Turn(written=3)], 5) == (Turn(written=2),)
    asked = [SpanRequest(token_ids=(9, *RIGHT), spans=((1, 4), (5, 8)), prompt_tokens=1)]
    ((first, last),) = context.scorer.policy(asked)
    assert last.tolist() == pytest.approx(np.log([0.7, 0.15, 0.9])) and bool(first.isfinite().all())


def test_tokens_that_are_read_are_not_generated(small):
    judged = judge_on(small, estimator_of("group"), Sampling(completions=128, batch=32, resamples=4))
    assert judged.tokens.estimate == 2.0


UNBIASED = {
    "rloo": ("group", {"baseline": "leave_one_out", "scale": "none"}),
    "leave-one-out tree": ("leave_one_out_tree", {}),
    "regression": ("regression", {}),
    "otb, leave one out": ("optimal_token_baseline", {"leave_one_out": True}),
}


def estimate(policy, name, options, size):
    """The expectation over all groups; one group a call, so that statistics over groups are of no effect."""
    estimator, state = estimator_of(name, options), {}
    context = Context(entropy=ExactEntropies(policy=policy), state_of=lambda part: dict(state))
    return expected_gradient(policy, lambda groups: estimator(groups, context).values, size)


@pytest.mark.parametrize("case", UNBIASED)
def test_what_is_unbiased_stays_so_over_turns(case, small):
    np.testing.assert_allclose(estimate(small, *UNBIASED[case], 3), small.true_gradient, atol=1e-12)


def test_gigpo_has_the_true_gradient_by_turn_up_to_known_scales(small):
    """Centred, discount 1. n of G turns share the state s with probability P each, and E(n - 1, at least 0) is
    GP - 1 + (1 - P)^G. So beside (G - 1)/G of the episodes, a turn in s has 1 - (1 - (1 - P)^G)/(GP).
    """
    size = 3
    found = estimate(small, "gigpo", {"discount": 1.0, "turn_rewards": "ignored"}, size).reshape(small.policy_SV.shape)
    truth = small.true_gradient.reshape(small.policy_SV.shape)
    for state, share in (((), 1.0), ((1, FACT), 0.4), ((0, NOTHING), 0.6), ((2, NOTHING), 0.6)):
        scale = (size - 1) / size + 1 - (1 - (1 - share) ** size) / (size * share)
        index = small.state_of[state]
        np.testing.assert_allclose(found[index], scale * truth[index], atol=1e-12)


def test_gigpos_episodes_alone_are_dr_grpo(small):
    found = estimate(small, "gigpo", {"step_weight": 0.0, "turn_rewards": "ignored"}, 3)
    np.testing.assert_allclose(found, 2 / 3 * small.true_gradient, atol=1e-12)


def test_mt_grpos_turns_change_the_gradient_of_the_call_alone(small):
    """The right call has the reward 1: its advantage grows. The last turn has no observation, and GRPO's gradient."""
    plain = estimate(small, "group", {"eps": 1e-4}, 3).reshape(small.policy_SV.shape)
    turned = estimate(small, "mt_grpo", {}, 3).reshape(small.policy_SV.shape)
    call = small.state_of[()]
    added = turned[call] - plain[call]
    assert added[1] > 0.1 and added[1] == pytest.approx(-added[0] - added[2])
    others = [index for index in range(len(small.policy_SV)) if index != call]
    np.testing.assert_allclose(turned[others], plain[others], atol=1e-12)
    np.testing.assert_allclose(estimate(small, "mt_grpo", {"turn_weight": 0.0}, 3), plain.ravel(), atol=1e-12)


def test_every_row_of_the_table_is_measured_over_turns(small):
    sampling = Sampling(completions=256, batch=32, resamples=4)
    for row in contenders([]):
        judged = judge_on(small, row.estimator, sampling)
        assert torch.tensor([judged.scale.estimate, judged.variance.estimate, judged.tokens.estimate]).isfinite().all()


def test_the_table_says_where_an_estimator_of_turns_was_not_measured(tmp_path, capsys):
    words = [
        "--completions",
        "64",
        "--batch",
        "32",
        "--groups",
        "4",
        "--resamples",
        "4",
        "--only",
        "gigpo, std",
        "rloo",
    ]
    families = ["--families", "forks", TOOL.name]
    cells = main([*words, *families, "--plot", str(tmp_path / "plot.png")])
    found = {(cell.label, cell.family): cell.judgement is not None for cell in cells}
    measured = {("rloo", "forks"): True, ("rloo", TOOL.name): True, ("gigpo, std", TOOL.name): True}
    assert found == measured | {("gigpo, std", "forks"): False}
    assert (
        "Not measured elsewhere: gigpo, std: advantage=gigpo: completion 0 of problem p has no turns to credit; choose "
        "an environment, or advantage=group" in capsys.readouterr().out
    )
