"""Continuations and grades from a table: the value of a state is what its ids add up to."""

from dataclasses import dataclass, field, replace

import torch

from rltrain.types import Completion, Context, RolloutServices


@dataclass
class Table:
    """A state has the value ``values[ids so far]``: draw k of K is right where k < value·K, and abstains for None."""

    values: dict
    tokenizer: object = None
    asked: list = field(default_factory=list)

    def continue_(self, requests):
        self.asked += requests
        return [[self._completion(request, draw) for draw in range(request.draws)] for request in requests]

    def _completion(self, request, draw):
        value = self.values[request.completion_ids]
        right = -1 if value is None else draw < round(value * request.draws)
        return Completion(token_ids=(1000 + right,), logprobs=(0.0,), finish="stop")

    def grade(self, groups):
        """The last id says the reward; 999 abstains."""
        return [
            replace(group, rewards_G=torch.tensor([_reward(one.token_ids[-1]) for one in group.completions]))
            for group in groups
        ]

    def context(self, **fields):
        services = RolloutServices(continuer=self)
        return Context(tokenizer=self.tokenizer, rollout=services, grade=self.grade, max_new_tokens=16, **fields)


def _reward(last):
    return torch.nan if last == 999 else float(last - 1000)
