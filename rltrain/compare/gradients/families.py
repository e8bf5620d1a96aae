"""Families of problems small enough to enumerate: every completion, the exact gradient and the value of every prefix.

The policy is a table with its own softmax for every prefix, so nothing about it has to be estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from rltrain.types import Completion

EOS = 0
VOCABULARY = 4
LOGIT_STD = 0.5


@dataclass(frozen=True, kw_only=True)
class Family:
    """A reward on completions of ``length`` tokens; with ``eos_from``, token 0 ends one from that many tokens on.

    ``row`` gives the policy's probabilities behind a prefix; without it they are random.
    """

    name: str
    says: str
    length: int
    correct: Callable[[tuple[int, ...]], bool]
    eos_from: int | None = None
    row: Callable[[tuple[int, ...]], Sequence[float]] | None = None

    def text(self, ids: Sequence[int]) -> str:
        """Every token but EOS ends a step, so that an estimator that works by steps may act after each token."""
        has_eos = self.eos_from is not None
        return "".join("" if has_eos and token == EOS else f"{token}.\n\n" for token in ids)


METHOD = (0.3, 0.4, 0.3, 0.0)  # the second is right
WORDING = (0.7, 0.15, 0.15, 0.0)
WORDS = 5


def _deciding_at(place: int) -> Callable[[tuple[int, ...]], Sequence[float]]:
    """A method at ``place`` of a completion of words, and the answer that follows from it at the end."""

    def row(prefix: tuple[int, ...]) -> Sequence[float]:
        if len(prefix) == WORDS + 1:
            return [float(token == prefix[place]) for token in range(VOCABULARY)]
        return METHOD if len(prefix) == place else WORDING

    return row


FAMILIES = (
    Family(name="decisive token", says="token 3 of 5 is right", length=5, correct=lambda ids: ids[2] == 1),
    Family(
        name="two needed tokens",
        says="tokens 1 and 4 of 5 are right",
        length=5,
        correct=lambda ids: ids[0] == 1 and ids[3] == 2,
    ),
    Family(
        name="redundant tail",
        says="token 2 is right; up to 4 more follow that change nothing",
        length=6,
        correct=lambda ids: ids[1] == 1,
        eos_from=2,
    ),
    Family(
        name="sparse success",
        says="tokens 1, 2 and 3 of 5 are right",
        length=5,
        correct=lambda ids: ids[:3] == (1, 2, 3),
    ),
    Family(
        name="forks",
        says=f"token 1 is right with p = 0.4; {WORDS} likely words and an answer that follows from it come after",
        length=WORDS + 2,
        correct=lambda ids: ids[0] == 1,
        row=_deciding_at(0),
    ),
    Family(
        name="forks, mirrored",
        says=f"the same decision after the {WORDS} words",
        length=WORDS + 2,
        correct=lambda ids: ids[WORDS] == 1,
        row=_deciding_at(WORDS),
    ),
)


@dataclass(frozen=True, kw_only=True)
class TabularPolicy:
    """A family under one random policy, enumerated: C completions, S prefixes that go on, D = S·V parameters."""

    family: Family
    policy_SV: np.ndarray
    state_of: dict[tuple[int, ...], int]
    completions: list[tuple[int, ...]]
    probability_C: np.ndarray
    reward_C: np.ndarray

    @property
    def expected_reward(self) -> float:
        return float(self.probability_C @ self.reward_C)

    @cached_property
    def values(self) -> dict[tuple[int, ...], float]:
        """The exact value of every prefix and completion: its expected reward under the policy."""
        values = dict(zip(self.completions, self.reward_C.tolist(), strict=True))
        for state in sorted(self.state_of, key=len, reverse=True):
            row = self.policy_SV[self.state_of[state]]
            values[state] = sum(row[token] * values[(*state, token)] for token in np.flatnonzero(row).tolist())
        return values

    @cached_property
    def _tokens(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per completion, the state before each token and the flat parameter of the token."""
        rows = [(np.array(self.states(ids)), np.array(ids)) for ids in self.completions]
        return [(states, states * VOCABULARY + ids) for states, ids in rows]

    @cached_property
    def reward_of(self) -> dict[tuple[int, ...], float]:
        """The reward of every whole completion."""
        return dict(zip(self.completions, self.reward_C.tolist(), strict=True))

    def states(self, ids: tuple[int, ...]) -> list[int]:
        """The state before each token."""
        return [self.state_of[ids[:t]] for t in range(len(ids))]

    def logprobs(self, ids: tuple[int, ...]) -> np.ndarray:
        """Of each token of a completion or its beginning, [T]."""
        return np.log(self.policy_SV[self.states(ids), list(ids)])

    def with_rows(self, policy_SV: np.ndarray) -> TabularPolicy:
        """The same completions under another policy."""
        probabilities = [np.prod(policy_SV[self.states(ids), list(ids)]) for ids in self.completions]
        return replace(self, policy_SV=policy_SV, probability_C=np.array(probabilities))

    @cached_property
    def sampled(self) -> list[Completion]:
        """The completions as an estimator gets them, with the log-probs of the policy that they are drawn from."""
        return [
            Completion(
                token_ids=ids,
                logprobs=tuple(self.logprobs(ids).tolist()),
                finish="stop",
                text=self.family.text(ids),
            )
            for ids in self.completions
        ]

    def gradient(self, drawn: Sequence[int], weights: np.ndarray) -> np.ndarray:
        """``sum_n weights_n·grad log pi(token_n)`` over the tokens of the drawn completions, shape [D]."""
        states = np.concatenate([self._tokens[i][0] for i in drawn])
        entries = np.concatenate([self._tokens[i][1] for i in drawn])
        taken_SV = np.bincount(entries, weights, self.policy_SV.size).reshape(self.policy_SV.shape)
        return (taken_SV - np.bincount(states, weights, len(self.policy_SV))[:, None] * self.policy_SV).ravel()

    @cached_property
    def true_gradient(self) -> np.ndarray:
        """The gradient of the expected reward, by enumeration."""
        lengths = [len(ids) for ids in self.completions]
        return self.gradient(range(len(lengths)), np.repeat(self.probability_C * self.reward_C, lengths))


def _row_of(family: Family, prefix: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Weights of the next token."""
    if family.row is not None:
        return np.array(family.row(prefix), dtype=np.float64)
    row = np.exp(LOGIT_STD * generator.standard_normal(VOCABULARY))
    if family.eos_from is not None and len(prefix) < family.eos_from:
        row[EOS] = 0.0
    return row


def enumerated(family: Family, seed: int) -> TabularPolicy:
    """Every prefix has logits of its own: the family's, or random ones, normal with standard deviation 0.5."""
    generator = np.random.default_rng(seed)
    rows, state_of, completions, probabilities = [], {}, [], []
    frontier: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while frontier:
        prefix, probability = frontier.pop()
        ended = bool(prefix) and family.eos_from is not None and prefix[-1] == EOS
        if ended or len(prefix) == family.length:
            completions.append(prefix)
            probabilities.append(probability)
            continue
        row = _row_of(family, prefix, generator)
        state_of[prefix] = len(rows)
        rows.append(row / row.sum())
        frontier += [((*prefix, token), probability * rows[-1][token]) for token in np.flatnonzero(row).tolist()]
    return TabularPolicy(
        family=family,
        policy_SV=np.array(rows),
        state_of=state_of,
        completions=completions,
        probability_C=np.array(probabilities),
        reward_C=np.array([float(family.correct(ids)) for ids in completions]),
    )
