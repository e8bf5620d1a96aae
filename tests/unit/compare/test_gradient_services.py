"""What a table gives an estimator besides groups, against the table itself."""

import numpy as np
import pytest
import torch

from rltrain.advantages.estimator import estimator_of
from rltrain.compare.gradients import FAMILIES, Family, judge
from rltrain.compare.gradients.judging import PROMPT, Sampling, judge_on, policy_of
from rltrain.compare.gradients.services import Table, graded, sharpened, teacher_of
from rltrain.registry import discover
from rltrain.rollout.continuation_types import ContinuationRequest, ContinuationSampling
from rltrain.types import Advantages, Completion, Group, Need, SpanRequest

FEW = {"completions": 128, "batch": 32, "resamples": 20}
FORKS = next(family for family in FAMILIES if family.name == "forks")
TAIL = next(family for family in FAMILIES if family.name == "redundant tail")


@pytest.fixture(autouse=True, scope="module")
def registered():
    discover()


def request(ids, draws=4000, max_new_tokens=9, sampling=None):
    return ContinuationRequest(
        problem_id="p", sample_index=0, prompt_ids=(1,), completion_ids=ids, draws=draws,
        max_new_tokens=max_new_tokens, sampling=sampling,
    )  # fmt: skip


def test_forks_and_its_mirror_are_what_they_say():
    """Right with p = 0.4; the answer repeats the method; the gradient lies on the decision alone."""
    for name, place in (("forks", 0), ("forks, mirrored", 5)):
        policy = policy_of(next(family for family in FAMILIES if family.name == name), 0)
        assert policy.expected_reward == pytest.approx(0.4, abs=1e-12)
        assert len(policy.completions) == 3 * 3**5 and all(ids[-1] == ids[place] for ids in policy.completions)
        rows = policy.true_gradient.reshape(policy.policy_SV.shape)
        moved = {len(state) for state, index in policy.state_of.items() if np.abs(rows[index]).max() > 1e-12}
        assert moved == {place}
    assert policy_of(FORKS, 0).true_gradient.reshape(-1, 4)[policy_of(FORKS, 0).state_of[()]].tolist() == pytest.approx(
        [-0.12, 0.24, -0.12, 0.0]
    )  # pi_v(r_v - 0.4)


def test_continuations_are_those_of_the_table():
    """The mean reward behind a state is its value, to the noise of 4000 draws; tokens are counted; limits are kept."""
    policy = policy_of(TAIL, 0)
    table = Table(policy=policy, seed=0)
    (drawn, cut, whole) = table.context.rollout.continue_([request((2,)), request((2,), 10, 1), request((2, 1, 0))])
    finished = [Completion(token_ids=(2, *c.token_ids), logprobs=(0.0, *c.logprobs), finish=c.finish) for c in drawn]
    (group,) = table.context.grade([Group(prompt=PROMPT, completions=tuple(finished))])
    assert float(group.rewards_G.mean()) == pytest.approx(policy.values[2,], abs=4 * 0.5 / 4000**0.5)
    lengths = sum(len(one.token_ids) for one in drawn)
    assert table.continuer.tokens == [lengths + 10]
    assert {len(one.token_ids) for one in cut} == {1} and {one.finish for one in cut} == {"length"}
    assert {one.token_ids for one in whole} == {()} and {one.finish for one in drawn} == {"stop"}
    state, token = policy.state_of[2,], drawn[0].token_ids[0]
    assert drawn[0].logprobs[0] == pytest.approx(np.log(policy.policy_SV[state, token]))
    assert graded(policy, [Group(prompt=PROMPT, completions=tuple(cut))])[0].rewards_G.tolist() == [0.0] * 10


def test_continuations_may_be_sharpened():
    policy = policy_of(FORKS, 0)
    row = sharpened(policy, ContinuationSampling(temperature=0.5)).policy_SV[policy.state_of[()]]
    assert row.tolist() == pytest.approx([0.09 / 0.34, 0.16 / 0.34, 0.09 / 0.34, 0.0])
    nucleus = sharpened(policy, ContinuationSampling(temperature=1.0, top_p=0.69)).policy_SV[policy.state_of[1,]]
    assert nucleus.tolist() == [1.0, 0.0, 0.0, 0.0]
    kept = sharpened(policy, ContinuationSampling(temperature=1.0, top_k=2)).policy_SV[policy.state_of[1,]]
    assert kept.tolist() == pytest.approx([0.7 / 0.85, 0.15 / 0.85, 0.0, 0.0])
    (draws,) = Table(policy=policy, seed=0).context.rollout.continue_(
        [request((1,), 50, sampling=ContinuationSampling(temperature=1.0, top_p=0.69))]
    )
    assert {one.token_ids for one in draws} == {(0, 0, 0, 0, 0, 1)}


def test_entropies_and_scores_are_those_of_the_rows():
    policy = policy_of(FORKS, 0)
    context = Table(policy=policy, seed=0).context
    ids = (1, 0, 2, 0, 0, 1, 1)
    group = Group(prompt=PROMPT, completions=(Completion(token_ids=ids, logprobs=(0.0,) * 7, finish="stop"),))
    token = context.entropy([group])[0][0]
    method, words = (-sum(p * np.log(p) for p in row) for row in ((0.3, 0.4, 0.3), (0.7, 0.15, 0.15)))
    assert token.entropy_T.tolist() == pytest.approx([method, *[words] * 5, 0.0])
    assert token.collision_T.tolist() == pytest.approx([0.34, *[0.535] * 5, 1.0])
    asked = [SpanRequest(token_ids=(9, 9, *ids), spans=((2, 4), (8, 9)), prompt_tokens=2)]
    first, last = context.scorer.policy(asked)[0]
    assert first.tolist() == pytest.approx([np.log(0.4), np.log(0.7)]) and last.tolist() == [0.0]
    assert context.scorer.entropies(asked)[0][0].tolist() == pytest.approx([method, words])
    taught = np.exp(1 / 0.2) * 0.4
    assert context.scorer.phi(asked)[0][0].tolist() == pytest.approx([np.log(taught / (taught + 0.6)), np.log(0.7)])
    assert teacher_of(policy).expected_reward == pytest.approx(taught / (taught + 0.6))


def counts_calls(groups, options, context):
    """Keeps a count, and asks for two continuations per completion."""
    context.state["calls"] = context.state.get("calls", torch.zeros(1)) + 1
    options["seen"].append(int(context.state["calls"]))
    context.rollout.continue_([request((0,), 1, 1) for group in groups for _ in group.completions for _ in "ab"])
    return Advantages(values=[[torch.ones(len(ids)) for ids in group.completion_ids] for group in groups])


counts_calls.needs = {Need.STATE, Need.CONTINUATIONS}


def test_a_state_is_kept_and_warmed_up_and_tokens_of_continuations_are_counted():
    """Ten batches before the four that are judged. Five tokens of a completion and two continued ones."""
    seen = []
    family = Family(name="plain", says="", length=5, correct=lambda ids: ids[0] == 1)
    (judged,) = judge(counts_calls, {"seen": seen}, families=[family], **FEW).values()
    assert seen == list(range(1, 15))
    assert judged.tokens.estimate == judged.tokens.low == 7.0
    assert judged.snr_per_token.estimate == pytest.approx(judged.snr.estimate / 7)


@pytest.mark.parametrize("name", ["leave_one_out_tree", "regression"])
def test_what_is_unbiased_has_an_interval_that_holds_zero(name):
    judged = judge_on(policy_of(FORKS, 0), estimator_of(name), Sampling(completions=2048, batch=64, resamples=100))
    assert judged.bias.low == 0.0 and 0.8 < judged.scale.estimate < 1.2
