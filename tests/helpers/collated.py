"""Groups of known lengths."""

import torch

from rltrain.types import Completion, Group, Problem, Prompt


def group(lengths, rewards, *, prompt=(7, 8), name="p") -> Group:
    completions = tuple(
        Completion(token_ids=tuple(range(10, 10 + n)), logprobs=(-0.5,) * n, finish="stop") for n in lengths
    )
    problem = Problem(id=name, prompt="", answer="")
    rewards_G = torch.tensor(rewards, dtype=torch.float64)
    return Group(prompt=Prompt(problem=problem, token_ids=tuple(prompt)), completions=completions, rewards_G=rewards_G)


def spread(groups, value=1.0):
    return [[torch.full((len(c.token_ids),), value) for c in g.completions] for g in groups]
