"""Which token is taken: by hand, and against a loop without caches."""

import dataclasses
from collections import Counter

import pytest
import torch

from rltrain import cli
from rltrain.config import SamplingConfig
from rltrain.policy.load import load_policy
from rltrain.rollout.local import decoder_kinds
from rltrain.rollout.reverse_speculation import FriendlyTrace, Veto, write
from rltrain.rollout.sampling import distribution, inverse_cdf, uniforms
from rltrain.rollout.stopping import StopRule


def veto(threshold=0.01, tries=2, **sampling):
    return Veto(threshold=threshold, tries=tries, sampling=dataclasses.replace(SamplingConfig(), **sampling))


# The teacher draws token 0 for u < 1/2, else 1. The student finds 0 unlikely (0.001), and would write 2 (0.9) or 1.
TEACHER = torch.tensor([0.5, 0.5, 1e-30]).log()
STUDENT = torch.tensor([0.001, 0.099, 0.9]).log()


@pytest.mark.parametrize(
    ("threshold", "drawn", "token", "tries"),
    [
        (0.01, [0.7, 0.2, 0.5], 1, 0),  # the first proposal is likely enough
        (0.01, [0.2, 0.7, 0.5], 1, 1),  # the second is
        (0.01, [0.2, 0.3, 0.5], 2, 2),  # neither: the student writes
        (0.01, [0.2, 0.3, 0.05], 1, 2),
        (0.0, [0.2, 0.7, 0.5], 0, 0),  # nothing is vetoed
        (0.5, [0.7, 0.7, 0.5], 2, 2),
    ],
)
def test_the_first_likely_proposal_is_taken_or_the_students_draw(threshold, drawn, token, tries):
    tokens_B, tries_B = veto(threshold).choose(TEACHER[None], STUDENT[None], torch.tensor([drawn], dtype=torch.float64))
    assert (tokens_B.tolist(), tries_B.tolist()) == ([token], [tries])


def test_padding_columns_of_either_model_are_never_drawn():
    wide = torch.cat([TEACHER, torch.tensor([50.0])])[None]
    uniforms_BK = torch.tensor([[0.999, 0.999, 0.999]], dtype=torch.float64)
    assert veto(0.0).choose(wide, STUDENT[None], uniforms_BK)[0].tolist() == [1]
    wide = torch.cat([STUDENT, torch.tensor([50.0])])[None]
    assert veto(1.0).choose(TEACHER[None], wide, uniforms_BK)[0].tolist() == [2]


@pytest.fixture(scope="module")
def policies():
    """A student and a teacher of random weights and one vocabulary."""
    sizes = ["model.hidden_size=32", "model.layers=2", "model.heads=2", "model.intermediate_size=64"]
    made = [load_policy(cli.compose([*sizes, f"model.init_seed={seed}"]).model) for seed in (0, 1)]
    for policy in made:
        policy.model.eval().requires_grad_(False)
        for parameter in policy.model.parameters():
            parameter.mul_(3)  # so that the models are sure, of different things
    return made


def reference(policies, trace, asked, rule):
    """The same trace by whole forwards, one draw after the other."""
    ids, origins = list(trace.prompt_ids), Counter()
    for position in range(rule.max_new_tokens):
        student, teacher = (policy.model(torch.tensor([ids])).logits[0, -1:] for policy in policies)
        for tries in range(asked.tries + 1):
            u = uniforms(torch.tensor([trace.key]), torch.tensor([position * (asked.tries + 1) + tries]))
            options = {key: getattr(asked.sampling, key) for key in ("temperature", "top_k", "top_p")}
            source = teacher if tries < asked.tries else student
            token = int(inverse_cdf(distribution(source, **options), u))
            if tries == asked.tries or float(student.softmax(-1)[0, token]) >= asked.threshold:
                break
        ids.append(token)
        origins["teacher_first" if tries == 0 else "teacher_later" if tries < asked.tries else "student"] += 1
        if token in rule.stop_ids:
            break
    return ids[len(trace.prompt_ids) :], origins


def test_traces_are_those_of_a_loop_without_caches(policies):
    asked = veto(threshold=0.02, tries=3, temperature=0.7, top_p=0.95, top_k=20, max_new_tokens=14)
    rule = dataclasses.replace(StopRule.of(policies[0], asked.sampling), stop_ids=frozenset(range(3, 12)))
    prompts = [[5, 6, 7], [9], [5, 6, 7, 8, 10, 11], [12, 13]]
    traces = [FriendlyTrace(prompt_ids=ids, key=17 * index) for index, ids in enumerate(prompts)]
    expected = [reference(policies, trace, asked, rule) for trace in traces]
    student, teacher = (
        decoder_kinds(policy.model, pad_id=policy.pad_token_id)[0].make(rule.max_new_tokens) for policy in policies
    )
    write(traces, teacher, student, asked, rule)
    assert [(trace.token_ids, trace.origins) for trace in traces] == expected
    total = sum((trace.origins for trace in traces), Counter())
    assert min(total["teacher_first"], total["teacher_later"], total["student"]) > 0  # every way was taken
    assert len({len(trace.token_ids) for trace in traces}) > 1  # and rows left at different times
