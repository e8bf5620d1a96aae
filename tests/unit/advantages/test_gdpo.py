"""GDPO by hand, beside TRL's normalisation of each reward, and what decoupling is for."""

import dataclasses
import math

import pytest
import torch
from advantage_groups import make_group

from rltrain.advantages.gdpo import GDPOConfig, decoupled, gdpo
from rltrain.errors import RunError
from rltrain.types import Context


def scored(ids, **parts):
    group = make_group(ids, [0.0] * len(ids))
    named = {name: torch.tensor([math.nan if s is None else s for s in scores]) for name, scores in parts.items()}
    applied = [scores for scores in named.values() if not bool(scores.isnan().all())]
    return dataclasses.replace(group, rewards_G=sum(applied[1:], applied[0].clone()), reward_parts=named)


IDS = [(1, 2), (3,), (4, 4, 4)]
CONTEXT = Context(reward_weights={"answer": 1.0, "form": 0.5})


def test_hand_computed():
    """answer (1, 0, 0): mean 1/3, sample std √(1/3), so (2, -1, -1)/√3. form (0, 2, 4): mean 2, std 2: (-1, 0, 1).

    S = answer + form/2; its mean over the group is 0, so the batch of one group is whitened by √(mean S²).
    """
    group = scored(IDS, answer=[1.0, 0.0, 0.0], form=[0.0, 2.0, 4.0])
    summed = [2 / 3**0.5 - 0.5, -1 / 3**0.5, -1 / 3**0.5 + 0.5]
    assert decoupled(group, CONTEXT.reward_weights, eps=0.0).tolist() == pytest.approx(summed, abs=1e-12)
    std = (sum(value**2 for value in summed) / 3) ** 0.5
    (rows,) = gdpo([group], GDPOConfig(eps=0.0), CONTEXT).values
    for row_T, value, ids in zip(rows, summed, IDS, strict=True):
        assert row_T.tolist() == pytest.approx([value / (std + 1e-8)] * len(ids), abs=1e-12)


def test_whitened_over_completions_as_in_trl():
    """TRL 1.16, multi_objective_aggregation=normalize_then_sum, over completions: ours with ddof 0 in the batch."""
    generator = torch.Generator().manual_seed(0)
    rewards_BK = torch.rand((12, 2), generator=generator, dtype=torch.float64)
    groups = [
        scored(
            [(1,), (2, 2), (3, 3, 3)], answer=rewards_BK[i : i + 3, 0].tolist(), form=rewards_BK[i : i + 3, 1].tolist()
        )
        for i in range(0, 12, 3)
    ]
    found = torch.tensor([row_T[0] for rows in gdpo(groups, GDPOConfig(eps=1e-4), CONTEXT).values for row_T in rows])
    grouped = rewards_BK.view(4, 3, 2).float().double()  # make_group keeps rewards in fp32
    normal_B = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).view(12, 2)
    summed_B = normal_B @ torch.tensor([1.0, 0.5], dtype=torch.float64)
    expected = (summed_B - summed_B.mean()) / (summed_B.std(correction=0) + 1e-8)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_rewards_that_cancel_in_the_sum_still_teach():
    """GRPO sees two equal totals; by parts they differ, and the part of more weight decides."""
    group = scored([(1,), (2,)], answer=[1.0, 0.0], form=[0.0, 1.0])
    assert group.rewards_G.tolist() == [1.0, 1.0]
    (rows,) = gdpo([group], GDPOConfig(), CONTEXT).values
    assert [row_T.tolist() for row_T in rows] == [[pytest.approx(1.0, abs=1e-6)], [pytest.approx(-1.0, abs=1e-6)]]
    assert GDPOConfig().learns_from_equal_rewards()


def test_a_reward_that_does_not_apply_and_a_completion_that_abstains():
    applies = scored(IDS, answer=[1.0, 0.0, 0.0])
    absent = scored(IDS, answer=[1.0, 0.0, 0.0], form=[None, None, None])
    assert decoupled(applies, {}, eps=0.0).tolist() == decoupled(absent, {}, eps=0.0).tolist()
    partly = scored(IDS, answer=[1.0, 0.0, None], form=[1.0, 2.0, 3.0])
    assert decoupled(partly, {}, eps=0.0).tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-12)  # 1/√2 - 1/√2


def test_a_batch_without_a_difference_gives_zeros_and_a_lone_total_is_refused():
    (rows,) = gdpo([scored(IDS, answer=[0.3] * 3)], GDPOConfig(), CONTEXT).values
    assert [row_T.tolist() for row_T in rows] == [[0.0, 0.0], [0.0], [0.0, 0.0, 0.0]]
    with pytest.raises(RunError, match="problem p: its rewards by name are not known here, only their sum"):
        gdpo([make_group(IDS, [1.0, 0.0, 0.0])], GDPOConfig(), CONTEXT)
