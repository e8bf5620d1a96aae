import itertools
import math

import pytest
import torch
from advantage_groups import make_group
from table_scorer import TableScorer
from tiny_run import config

from rltrain.advantages.opd import OPDConfig, fell, opd, opd_advantages
from rltrain.errors import ConfigError
from rltrain.types import Completion, Context, Group

TEACHER = {(): [0.5, 0.3, 0.2], (0,): [0.1, 0.1, 0.8], (1,): [0.4, 0.4, 0.2], (2,): [0.6, 0.2, 0.2]}


def context_of(policy, teacher):
    """Tables of probabilities by the completion so far; the prompt is one token."""
    tables = {"policy": lambda ids, token: math.log(policy[ids[1:]][token])}
    tables["phi"] = lambda ids, token: math.log(teacher[ids[1:]][token])
    return Context(scorer=TableScorer(tables))


def with_logprobs(group, logprobs):
    completions = [
        Completion(token_ids=one.token_ids, logprobs=tuple(row), finish="stop")
        for one, row in zip(group.completions, logprobs, strict=True)
    ]
    return Group(prompt=group.prompt, completions=tuple(completions), rewards_G=group.rewards_G)


def test_by_hand():
    """Probabilities 1/2 and 1/4 of the teacher, 1/4 and 1/2 of the policy: log 2 and -log 2."""
    found = opd_advantages(torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log())
    assert found.tolist() == pytest.approx([math.log(2), -math.log(2)])


def test_the_expected_gradient_is_that_of_the_kl_at_each_state():
    """Over all completions of two tokens: sum of pi(y)·A_t·grad log pi = -grad KL(pi || teacher), states as sampled."""
    logits = {state: torch.randn(3, dtype=torch.float64, requires_grad=True) for state in TEACHER}
    logprobs = {state: row.log_softmax(-1) for state, row in logits.items()}
    policy = {state: row.exp().tolist() for state, row in logprobs.items()}
    every = list(itertools.product(range(3), repeat=2))
    (values,) = opd([make_group(every, [0.0] * 9)], OPDConfig(max_drop=None), context_of(policy, TEACHER)).values
    objective = torch.zeros((), dtype=torch.float64)
    for (first, second), (a, b) in zip(every, values, strict=True):
        chance = policy[()][first] * policy[(first,)][second]
        objective = objective + chance * (a * logprobs[()][first] + b * logprobs[(first,)][second])
    divergence = torch.zeros((), dtype=torch.float64)
    for state, row in logprobs.items():
        reached = policy[()][state[0]] if state else 1.0
        divergence = divergence + reached * (row.exp() * (row - torch.tensor(TEACHER[state]).double().log())).sum()
    found = torch.autograd.grad(objective, list(logits.values()), retain_graph=True)
    expected = torch.autograd.grad(-divergence, list(logits.values()))
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-9)


def test_tokens_that_fell_are_dropped():
    """From 0.9 to 0.6 is more than 0.2, from 0.7 to 0.6 is not; a rise never is."""
    now = torch.tensor([0.6, 0.6, 0.6]).log()
    assert fell(torch.tensor([0.9, 0.7, 0.1]).log(), now, max_drop=0.2).tolist() == [True, False, False]
    policy = {(): [0.6, 0.2, 0.2], (0,): [0.6, 0.2, 0.2]}
    group = with_logprobs(make_group([[0, 0], [0]], [1, 0]), [[math.log(0.9), math.log(0.7)], [math.log(0.7)]])
    found = opd([group], OPDConfig(), context_of(policy, TEACHER))
    assert found.values[0][0].tolist() == pytest.approx([0, math.log(0.1 / 0.6)])
    assert found.values[0][1].tolist() == pytest.approx([math.log(0.5 / 0.6)])
    dropped, gap = found.metrics["opd/dropped_share"], found.metrics["opd/reverse_kl"]
    assert (dropped.total, dropped.count, gap.count) == (1, 3, 3)
    assert gap.total == pytest.approx(2 * math.log(0.6 / 0.5) + math.log(0.6 / 0.1))


def test_without_rewards_with_equal_ones_and_without_tokens():
    policy = {(): [0.5, 0.25, 0.25]}
    for rewards_G in (None, torch.ones(2)):
        group = with_logprobs(make_group([[1], []], [1, 1]), [[math.log(0.25)], []])
        group = Group(prompt=group.prompt, completions=group.completions, rewards_G=rewards_G)
        (values,) = opd([group], OPDConfig(), context_of(policy, TEACHER)).values
        assert [row.tolist() for row in values] == [pytest.approx([math.log(0.3 / 0.25)]), []]


TEACHER_KEY = ["algorithm=opd", "scorer.path=somewhere"]


@pytest.mark.parametrize(("overrides", "message"), [
    (["algorithm=opd"], "distillation has no teacher; set scorer.kind=frozen and scorer.path=FOLDER"),
    ([*TEACHER_KEY, "sampling.temperature=0.7"], "sampling.temperature=0.7, top_k=0, top_p=1: distillation compares"),
    ([*TEACHER_KEY, "advantage.max_drop=1.5"], r"advantage.max_drop=1.5: must lie in \(0, 1\]"),
    ([*TEACHER_KEY, "~rewards.answer"], "eval_rewards: none is set; choose one, for example reward@eval_rewards"),
    ([*TEACHER_KEY, "batch.dynamic_sampling=true"], "drops groups that this estimator learns from; set it to false"),
    (["~rewards.answer"], "^rewards: none is set; choose one, for example reward@rewards.answer=boxed"),
])  # fmt: skip
def test_what_cannot_work_is_named(overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, *overrides)
