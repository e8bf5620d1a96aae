"""Groups as trees: the rule of the cuts by hand, and the leaves of a local engine."""

import dataclasses

import pytest
import torch
from local_engine import EOS, PROMPTS, Policy, engine, model, plain_logprobs, tokenizer
from tiny_run import config

from rltrain.config import SamplingConfig, TreeConfig
from rltrain.errors import ConfigError
from rltrain.rollout.local import LocalRollout, LocalRolloutConfig
from rltrain.rollout.stopping import StopRule
from rltrain.rollout.tree import Cut, TreeLeaf, TreeRollout, joined, next_cuts, ranked_cuts
from rltrain.types import Completion

TREE = TreeConfig(rounds=2, chains=3, places=2, branches=2)


def leaf(number, logprobs, shared=0):
    completion = Completion(token_ids=tuple(range(len(logprobs))), logprobs=tuple(logprobs), finish="stop")
    return TreeLeaf(number=number, completion=completion, shared=shared)


def test_cuts_lie_before_the_least_likely_tokens():
    """Before token 0 there is nothing to keep; a branch that shares two tokens begins to have cuts at its fourth."""
    chain, branch = leaf(0, [-9.0, -0.5, -2.0, -0.1]), leaf(4, [-9.0, -0.5, -7.0, -1.0, -2.0], shared=2)
    expected = [(0, 2), (4, 4), (4, 3), (0, 1), (0, 3)]
    assert ranked_cuts([chain, branch]) == [Cut(leaf=number, tokens=t) for number, t in expected]


def test_cuts_that_were_used_come_last_and_then_again():
    chain = leaf(0, [-1.0, -0.5, -2.0])
    assert next_cuts([chain], set(), 1) == [Cut(leaf=0, tokens=2)]
    used = {Cut(leaf=0, tokens=2)}
    assert next_cuts([chain], used, 1) == [Cut(leaf=0, tokens=1)]
    assert next_cuts([chain], used, 3) == [Cut(leaf=0, tokens=t) for t in (1, 2, 1)]


def test_a_completion_of_one_token_is_branched_at_its_start():
    assert next_cuts([leaf(5, [-1.0])], set(), 2) == [Cut(leaf=5, tokens=0)] * 2


def test_ids_and_logprobs_are_joined_as_they_are():
    prefix = Completion(token_ids=(20, 21, EOS), logprobs=(-1.0, -2.0, -3.0), finish="stop", text="old")
    branch = Completion(token_ids=(22, EOS), logprobs=(-4.0, -5.0), finish="stop", text="new")
    rule = StopRule.of(Policy(model("qwen3"), tokenizer()), SamplingConfig(max_new_tokens=9))
    found = joined(prefix, 2, branch, rule)
    assert (found.token_ids, found.logprobs, found.finish) == ((20, 21, 22, EOS), (-1.0, -2.0, -4.0, -5.0), "stop")
    assert found.text == tokenizer().decode([20, 21, 22])


def tree_engine(tree=TREE, sampling=None, **options):
    sampling, policy = sampling or SamplingConfig(max_new_tokens=24), Policy(model("qwen3"), tokenizer())
    inner = LocalRollout(LocalRolloutConfig(**options), sampling, policy, seed=7)
    return TreeRollout(inner, tree, sampling, policy)


@pytest.fixture(scope="module")
def groups():
    return tree_engine().generate(PROMPTS[:2], step=3, group_size=TREE.leaves)


def test_the_first_leaves_are_what_the_engine_samples(groups):
    alone = engine().generate(PROMPTS[:2], step=3, group_size=3)
    assert [group.completions[:3] for group in groups] == [group.completions for group in alone]


def test_every_branch_continues_a_cut_of_the_rule(groups):
    """Played again by hand: round, tree, cut, branch; a branch keeps its prefix's ids and log-probs bit for bit."""
    for group in groups:
        trees = [[TreeLeaf(number=g, completion=group.completions[g])] for g in range(3)]
        used, number = [set(), set(), set()], 3
        for _ in range(2):
            before = [list(leaves) for leaves in trees]
            for c in range(3):
                cuts = next_cuts(before[c], used[c], 2)
                used[c] |= set(cuts)
                for cut in cuts:
                    for _ in range(2):
                        own, base = group.completions[number], group.completions[cut.leaf]
                        assert own.token_ids[: cut.tokens] == base.token_ids[: cut.tokens]
                        assert own.logprobs[: cut.tokens] == base.logprobs[: cut.tokens]
                        assert len(own.token_ids) <= 24
                        trees[c].append(TreeLeaf(number=number, completion=own, shared=cut.tokens))
                        number += 1
        assert number == len(group.completions) == TREE.leaves


def test_logprobs_are_those_of_a_plain_forward(groups):
    for group in groups:
        for completion in group.completions:
            expected = plain_logprobs(model("qwen3"), group.prompt, completion.token_ids, 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, rtol=0, atol=2e-5)


def test_a_leaf_depends_on_seed_step_and_problem_alone(groups):
    one_by_one = tree_engine(max_rows=1)
    for prompt, group in zip(PROMPTS[:2], groups, strict=True):
        (alone,) = one_by_one.generate([prompt], step=3, group_size=TREE.leaves)
        assert alone.completion_ids == group.completion_ids
    (later,) = tree_engine().generate(PROMPTS[:1], step=4, group_size=TREE.leaves)
    assert later.completion_ids != groups[0].completion_ids
    again = dataclasses.replace(PROMPTS[0], occurrence=1)
    (repeat,) = tree_engine().generate([again], step=3, group_size=TREE.leaves)
    assert repeat.completion_ids != groups[0].completion_ids


def test_completions_of_one_token_are_a_group_of_chains():
    short = tree_engine(sampling=SamplingConfig(max_new_tokens=1))
    (group,) = short.generate(PROMPTS[:1], step=0, group_size=TREE.leaves)
    assert {len(ids) for ids in group.completion_ids} == {1}
    assert len(set(group.completion_ids)) > 3  # branches are draws of their own


def test_nothing_to_sample_is_nothing():
    assert tree_engine().generate([], step=0, group_size=TREE.leaves) == []


def test_an_evaluation_has_no_tree():
    greedy = SamplingConfig(max_new_tokens=24, temperature=0.0)
    found = tree_engine().generate(PROMPTS[:1], step=-1, group_size=2, sampling=greedy)
    assert found == engine().generate(PROMPTS[:1], step=-1, group_size=2, sampling=greedy)


@pytest.mark.parametrize(("overrides", "message"), [
    (["rollout.tree.rounds=2"], r"batch.group_size=4: rollout.tree makes .* = 54 completions of a prompt; set batch.g"),
    (["rollout.tree.rounds=-1"], "rollout.tree.rounds=-1: must be >= 0; 0 samples no tree"),
    (["rollout.tree.branches=0"], "rollout.tree.branches=0: set at least 1"),
])  # fmt: skip
def test_what_cannot_work_is_named(overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, *overrides)


def test_its_leaves_are_the_group(tmp_path):
    tree = ["rollout.tree.rounds=1", "rollout.tree.chains=2", "rollout.tree.places=1", "rollout.tree.branches=1"]
    assert config(tmp_path, *tree).rollout.tree.leaves == 4
