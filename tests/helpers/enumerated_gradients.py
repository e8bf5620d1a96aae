"""The expectation of an estimator's gradient over every group that a small table can draw."""

import itertools
from dataclasses import replace

import numpy as np
import torch
from entropy_tables import float64

from rltrain.compare.gradients.families import Family, enumerated
from rltrain.types import Group, Problem, Prompt, TokenEntropy

PROMPT = Prompt(problem=Problem(id="p", prompt="", answer="1"), token_ids=(1,))
TWO_TOKENS = Family(name="two", says="", length=2, correct=lambda ids: ids in {(1, 2), (1, 3), (2, 0), (3, 3)})


def table(seed=0):
    """Sixteen completions of two tokens, four of them right, one in a branch of its own."""
    return enumerated(TWO_TOKENS, seed)


def all_groups(policy, size):
    """Every ordered group of ``size`` completions: the indices, the groups, and their probabilities."""
    drawn = list(itertools.product(range(len(policy.completions)), repeat=size))
    groups = [
        Group(
            prompt=PROMPT,
            completions=tuple(policy.sampled[i] for i in row),
            rewards_G=float64([policy.reward_C[i] for i in row]),
        )
        for row in drawn
    ]
    return drawn, groups, np.array([np.prod(policy.probability_C[list(row)]) for row in drawn])


def expected_gradient(policy, estimate, size):
    """``E[(1/G) sum_i sum_t A_it grad log pi]`` exactly; ``estimate(groups)`` gives the values of all groups."""
    drawn, groups, probability = all_groups(policy, size)
    rows = [row_T for rows in estimate(groups) for row_T in rows]
    weights = torch.cat(rows).numpy() / size
    tokens = [sum(len(policy.completions[i]) for i in row) for row in drawn]
    return policy.gradient([i for row in drawn for i in row], weights * np.repeat(probability, tokens))


def exact_entropies(policy):
    """``context.entropy`` from the table."""
    state_entropy = [-(row[row > 0] * np.log(row[row > 0])).sum() for row in policy.policy_SV]
    collision = (policy.policy_SV**2).sum(1)

    def of(ids):
        states = [policy.state_of[ids[:t]] for t in range(len(ids))]
        pair = (float64([values[state] for state in states]) for values in (state_entropy, collision))
        return TokenEntropy(**dict(zip(("entropy_T", "collision_T"), pair, strict=True)))

    return lambda groups: [[of(ids) for ids in group.completion_ids] for group in groups]


def shifted(groups, by):
    """The groups with a constant added to every reward."""
    return [replace(group, rewards_G=group.rewards_G + by) for group in groups]
