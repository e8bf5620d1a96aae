"""Groups of several turns, and services that answer by what the model wrote, whatever an environment answered.

Ids from 100 on are an environment's, and read like the end of a thought, a phrase and the end of a step. The others are
the model's.
"""

import itertools
import math
from dataclasses import dataclass, field, replace

import torch

from rltrain.rollout.probe_types import ProbeResult
from rltrain.types import (
    Completion,
    Context,
    Group,
    Problem,
    Prompt,
    RolloutServices,
    TokenEntropy,
    Turn,
    among_observed,
)

NAN = math.nan
FIRST_OBSERVED = 100


def written(ids):
    return tuple(token for token in ids if token < FIRST_OBSERVED)


class Words:
    """The text of the ids: every word of its own, with spaces around."""

    all_special_ids = (3,)

    def __len__(self):
        return 200

    def batch_decode(self, rows, **options):
        return ["".join(self.word(token) for token in row) for row in rows]

    def word(self, token):
        if token >= FIRST_OBSERVED:
            return "</think> wait \n"
        return {6: " six\n", 8: " wait "}.get(token, f" {token} ")

    def __call__(self, text, **options):
        return {"input_ids": [1]}


def logprob(token):
    return -0.1 - 0.35 * (token % 3)


def turn(written=1, observed=1, *, reward=0.0, key=None):
    return Turn(written=written, observed=observed, reward=reward, state_key=key)


def spoken(*parts, rewards=None, keys=None, text="", finish="stop"):
    """A completion of turns. ``parts`` are the ids of the turns: written, observed, written, …"""
    ids = tuple(itertools.chain(*parts))
    pairs = [*zip(parts[::2], [*parts[1::2], ()], strict=False)]
    turns = tuple(
        Turn(
            written=len(own),
            observed=len(read),
            reward=0.0 if rewards is None else rewards[k],
            state_key=None if keys is None else keys[k],
            called=bool(read),
        )
        for k, (own, read) in enumerate(pairs)
    )
    logprobs = among_observed([logprob(token) for token in written(ids)], turns, NAN)
    return Completion(token_ids=ids, logprobs=logprobs, finish=finish, text=text, turns=turns)


def alone(completion):
    """What the model wrote, as a completion of one turn."""
    ids = written(completion.token_ids)
    return replace(completion, turns=(), token_ids=ids, logprobs=tuple(logprob(token) for token in ids))


def group_of(completions, rewards, *, name="p"):
    rewards_G = torch.tensor([NAN if reward is None else reward for reward in rewards], dtype=torch.float64)
    prompt = Prompt(problem=Problem(id=name, prompt="why?", answer="1"), token_ids=(1, 2))
    return Group(prompt=prompt, completions=tuple(completions), rewards_G=rewards_G, reward_parts={"answer": rewards_G})


@dataclass
class ByWritten:
    """Every service, by the written ids before a place. ``observed_entropy`` stands at an environment's ids."""

    tokenizer: object
    observed_entropy: float = NAN
    state: dict = field(default_factory=dict)

    def value(self, ids):
        return sum(written(ids)) % 5 / 4

    def probe(self, requests, settings):
        return [
            ProbeResult(
                accuracy_K=torch.tensor([self.value(one.completion_ids[:cut]) for cut in one.cuts]).double(),
                confidence_K=torch.tensor(
                    [0.5 + 0.1 * (len(written(one.completion_ids[:cut])) % 4) for cut in one.cuts]
                ).double(),
            )
            for one in requests
        ]

    def continue_(self, requests):
        """Draw k of K is right where k < value·K."""
        return [
            [
                Completion(
                    token_ids=(90 + (k < self.value(one.completion_ids) * one.draws),), logprobs=(0.0,), finish="stop"
                )
                for k in range(one.draws)
            ]
            for one in requests
        ]

    def grade(self, groups):
        """The last id says the reward."""
        return [
            replace(group, rewards_G=torch.tensor([float(one.token_ids[-1] - 90) for one in group.completions]))
            for group in groups
        ]

    def entropy(self, groups):
        def of(ids):
            places = [len(written(ids[:t])) for t in range(len(ids))]
            values = [
                self.observed_entropy if token >= FIRST_OBSERVED else 0.25 * (token % 4) + 0.5 * (place % 2)
                for token, place in zip(ids, places, strict=True)
            ]
            values_T = torch.tensor(values, dtype=torch.float64)
            return TokenEntropy(entropy_T=values_T, collision_T=0.9 - values_T / 2)

        return [[of(ids) for ids in group.completion_ids] for group in groups]

    def values(self, groups):
        return [
            [
                torch.tensor(
                    [NAN if ids[t] >= FIRST_OBSERVED else self.value(ids[:t]) for t in range(len(ids))],
                    dtype=torch.float64,
                )
                for ids in group.completion_ids
            ]
            for group in groups
        ]

    def _scored(self, requests, scale):
        found = []
        for one in requests:
            prompt = one.prompt_tokens
            spans = []
            for start, stop in one.spans:
                assert all(token < FIRST_OBSERVED for token in one.token_ids[start:stop]), "an observed id is scored"
                rows = [
                    -scale * (1 + len(written(one.token_ids[prompt:t])) % 3) - 0.1 * one.token_ids[t] % 0.7
                    for t in range(start, stop)
                ]
                spans.append(torch.tensor(rows))
            found.append(spans)
        return found

    def policy(self, requests):
        return self._scored(requests, 0.3)

    def phi(self, requests):
        return self._scored(requests, 0.2)

    def reference(self, requests):
        return self._scored(requests, 0.4)

    def context(self):
        return Context(
            tokenizer=self.tokenizer,
            rollout=RolloutServices(prober=self, continuer=self),
            grade=self.grade,
            scorer=self,
            entropy=self.entropy,
            values=self.values,
            state_of=lambda part: self.state,
            encode=lambda prompt: (7, 8),
            max_new_tokens=64,
        )
