"""Families of problems small enough to enumerate: every completion, the exact gradient and the value of every prefix.

The policy is a table with its own softmax for every prefix, so nothing about it has to be estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from rltrain.types import Completion, Turn

EOS = 0
VOCABULARY = 4
LOGIT_STD = 0.5


Prefix = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TableReply:
    """What an environment answers a turn with: the ids that are read, a reward, and the key of the next state."""

    ids: Prefix
    reward: float
    key: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """A reward on completions of ``length`` tokens; with ``eos_from``, token 0 ends one from that many tokens on.

    ``row`` gives the policy's probabilities behind a prefix; without it they are random. ``reply`` says what an
    environment answers behind a prefix, or None: then the policy goes on. ``length`` counts its ids, too.
    """

    name: str
    says: str
    length: int
    correct: Callable[[Prefix], bool]
    eos_from: int | None = None
    row: Callable[[Prefix], Sequence[float]] | None = None
    reply: Callable[[Prefix], TableReply | None] | None = None

    def text(self, ids: Sequence[int]) -> str:
        """Every token but EOS ends a step, so that an estimator that works by steps may act after each token."""
        has_eos = self.eos_from is not None
        return "".join("" if has_eos and token == EOS else f"{token}.\n\n" for token in ids)

    def answered(self, prefix: Prefix) -> Prefix:
        """The prefix and what the environment answers behind it."""
        reply = self.reply(prefix) if self.reply else None
        return prefix + reply.ids if reply else prefix

    def turns(self, ids: Prefix) -> tuple[Turn, ...]:
        """The turns of a completion; none where no environment answers."""
        if self.reply is None:
            return ()
        turns, start, key = [], 0, "start"
        for stop in range(1, len(ids) + 1):
            if reply := self.reply(ids[:stop]):
                written, observed = stop - start, len(reply.ids)
                turns.append(Turn(written=written, observed=observed, reward=reply.reward, state_key=key, called=True))
                start, key = stop + observed, reply.key
        return (*turns, Turn(written=len(ids) - start, state_key=key))


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


FACT, NOTHING = 3, 0  # what a call is answered with


def _after_a_call(prefix: Prefix) -> Sequence[float]:
    """Two words and a call, then what it was answered with, two words and an answer, which the reply makes likely."""
    if len(prefix) == 2:
        return METHOD
    if len(prefix) == 6:
        return (0.05, 0.9, 0.05, 0.0) if prefix[3] == FACT else (0.4, 0.2, 0.4, 0.0)
    return WORDING


def _call(prefix: Prefix) -> TableReply | None:
    """The right call is answered with the fact."""
    if len(prefix) != 3:
        return None
    right = prefix[2] == 1
    return TableReply(ids=(FACT if right else NOTHING,), reward=float(right), key="told" if right else "not told")


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
    Family(
        name="a tool call decides",
        says="two words, a call that is right with p = 0.4, a reply that is read, two words, and an answer that is "
        "right with p = 0.9 after the right call and 0.2 after another",
        length=7,
        correct=lambda ids: ids[6] == 1,
        row=_after_a_call,
        reply=_call,
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
            after = {token: self.family.answered((*state, token)) for token in np.flatnonzero(row).tolist()}
            values |= {(*state, token): values[prefix] for token, prefix in after.items()}
            values[state] = sum(row[token] * values[prefix] for token, prefix in after.items())
        return values

    @cached_property
    def _tokens(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per completion, the state before each written token and the flat parameter of the token."""
        rows = [(np.array(self.states(ids)), np.array(self.written(ids))) for ids in self.completions]
        return [(states, states * VOCABULARY + ids) for states, ids in rows]

    @cached_property
    def _written(self) -> list[np.ndarray]:
        """Per completion, whether the policy wrote each token."""
        return [np.array([ids[:t] in self.state_of for t in range(len(ids))], dtype=bool) for ids in self.completions]

    @cached_property
    def reward_of(self) -> dict[tuple[int, ...], float]:
        """The reward of every whole completion."""
        return dict(zip(self.completions, self.reward_C.tolist(), strict=True))

    def states(self, ids: Prefix) -> list[int]:
        """The state before each written token."""
        return [self.state_of[ids[:t]] for t in range(len(ids)) if ids[:t] in self.state_of]

    def written(self, ids: Prefix) -> list[int]:
        """The tokens that the policy wrote."""
        return [ids[t] for t in range(len(ids)) if ids[:t] in self.state_of]

    def logprobs(self, ids: Prefix) -> np.ndarray:
        """Of each token of a completion or its beginning, [T]; NaN where an environment wrote it."""
        return self.laid_out(ids, np.log(self.policy_SV[self.states(ids), self.written(ids)]))

    def laid_out(self, ids: Prefix, values_W: np.ndarray) -> np.ndarray:
        """Values of the written tokens at their places, NaN at the others, [T]."""
        values_T = np.full(len(ids), np.nan)
        values_T[[ids[:t] in self.state_of for t in range(len(ids))]] = values_W
        return values_T

    def with_rows(self, policy_SV: np.ndarray) -> TabularPolicy:
        """The same completions under another policy."""
        probabilities = [np.prod(policy_SV[self.states(ids), self.written(ids)]) for ids in self.completions]
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
                turns=self.family.turns(ids),
            )
            for ids in self.completions
        ]

    def gradient(self, drawn: Sequence[int], weights: np.ndarray) -> np.ndarray:
        """``sum_n weights_n·grad log pi(token_n)`` over the tokens of the drawn completions, shape [D].

        ``weights`` has an entry for every token; those of tokens that an environment wrote are not read.
        """
        weights = weights[np.concatenate([self._written[i] for i in drawn])]
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
        frontier += [
            (family.answered((*prefix, token)), probability * rows[-1][token]) for token in np.flatnonzero(row).tolist()
        ]
    return TabularPolicy(
        family=family,
        policy_SV=np.array(rows),
        state_of=state_of,
        completions=completions,
        probability_C=np.array(probabilities),
        reward_C=np.array([float(family.correct(ids)) for ids in completions]),
    )
