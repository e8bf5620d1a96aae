"""Groups made from nothing but token ids and rewards, for the tests of estimators."""

import torch

from rltrain.types import Completion, Group, Problem, Prompt


def make_group(completion_ids, rewards, *, name="p"):
    completions = tuple(
        Completion(token_ids=tuple(ids), logprobs=(0.0,) * len(ids), finish="stop") for ids in completion_ids
    )
    prompt = Prompt(problem=Problem(id=name, prompt="", answer=""), token_ids=(0,))
    rewards_G = torch.tensor([torch.nan if reward is None else reward for reward in rewards])
    return Group(prompt=prompt, completions=completions, rewards_G=rewards_G)
