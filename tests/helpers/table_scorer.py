"""A scorer without a model: log-probs from functions of the ids before a token and the token."""

from dataclasses import dataclass, field

import torch


@dataclass
class TableScorer:
    """``policy``, ``phi`` and ``reference`` are ``f(ids before, id) -> log-prob``; ``asked`` keeps the requests."""

    tables: dict
    asked: list = field(default_factory=list)

    def _score(self, name, requests):
        self.asked += requests
        table = self.tables[name]
        return [
            [
                torch.tensor([table(one.token_ids[:t], one.token_ids[t]) for t in range(start, stop)])
                for start, stop in one.spans
            ]
            for one in requests
        ]

    def policy(self, requests):
        return self._score("policy", requests)

    def phi(self, requests):
        return self._score("phi", requests)

    def reference(self, requests):
        return self._score("reference", requests)

    def entropies(self, requests):
        raise NotImplementedError
