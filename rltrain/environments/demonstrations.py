"""Worked solutions of several turns as ids: what the model is to write, and what it reads in between.

A solution is a list of turns, each a text that the model writes or ``{"written": text, "observed": text}``. What is
observed is tokenised as in the rollout. Where no turn says what it observes, the run's environment is asked through the
rollout's own conversation, so that the ids are those that the loop would make.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rltrain.config import RunConfig
from rltrain.environments.pool import EnvironmentPool
from rltrain.policy.load import Policy
from rltrain.rollout.conversation import Conversation, TurnRules, begin, carry
from rltrain.rollout.observations import Observer
from rltrain.rollout.stopping import StopRule
from rltrain.types import Problem

AT_ONCE = 1024  # conversations that are held at the same time
KEYS = {"written", "observed"}


class BadTurns(ValueError):
    """Why a solution cannot be learnt from."""


@dataclass(frozen=True, kw_only=True)
class SolvedTurn:
    """What the model is to write, and what it reads after it: None in the last turn, or where nothing says so."""

    written: str
    observed: str | None = None


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """The ids after the prompt, and per id whether the model writes it."""

    token_ids: tuple[int, ...]
    written_T: tuple[bool, ...]


def solved_turns(solution: Sequence[Any]) -> list[SolvedTurn]:
    """The turns of a solution. ``BadTurns`` unless all turns but the last say what they observe, or none does."""
    turns = [_solved(turn, number) for number, turn in enumerate(solution, start=1)]
    if not turns:
        raise BadTurns("it has no turn")
    if turns[-1].observed is not None:
        raise BadTurns(f"turn {len(turns)} is the last and observes something; add the turn that follows")
    silent = [number for number, turn in enumerate(turns[:-1], start=1) if turn.observed is None]
    if silent and len(silent) < len(turns) - 1:
        raise BadTurns(
            f"turn {silent[0]} does not say what it observes and others do; give all, or none to ask for all"
        )
    return turns


def _solved(turn: Any, number: int) -> SolvedTurn:
    fields = {"written": turn} if isinstance(turn, str) else turn
    if not isinstance(fields, Mapping) or not set(fields) <= KEYS:
        raise BadTurns(f'turn {number} is neither a text nor {{"written": text, "observed": text}}')
    written, observed = fields.get("written"), fields.get("observed")
    if not isinstance(written, str) or not written:
        raise BadTurns(f"turn {number} has no text in written")
    if observed is not None and not isinstance(observed, str):
        raise BadTurns(f"turn {number} has no text in observed")
    return SolvedTurn(written=written, observed=observed)


@dataclass(frozen=True, kw_only=True)
class Demonstrator:
    """Makes the ids of solutions. ``rule`` says where a turn ends, ``rules`` and ``pool`` are of the environment."""

    tokenizer: Any
    rule: StopRule
    observer: Observer
    rules: TurnRules | None = None
    pool: EnvironmentPool | None = None

    def all_of(self, problems: Sequence[Problem], solutions: Sequence[Sequence[Any]]) -> list[Demonstration | BadTurns]:
        """A demonstration per problem, or why there is none."""
        pairs, made = list(zip(problems, solutions, strict=True)), []
        for start in range(0, len(pairs), AT_ONCE):
            made += self._together([self._one(*pair) for pair in pairs[start : start + AT_ONCE]])
        return made

    def _together(
        self, drafts: Sequence[Generator[Conversation, None, Demonstration]]
    ) -> list[Demonstration | BadTurns]:
        """Carry what each asks to the environment, until all are done."""
        made: dict[int, Demonstration | BadTurns] = {}
        while len(made) < len(drafts):
            asking: list[Conversation] = []
            for index, draft in enumerate(drafts):
                if index not in made:
                    try:
                        asking.append(next(draft))
                    except StopIteration as end:
                        made[index] = end.value
                    except BadTurns as error:
                        made[index] = error
            if self.pool is not None:
                carry(asking, self.pool, wait=True)
        return [made[index] for index in range(len(drafts))]

    def _one(self, problem: Problem, solution: Sequence[Any]) -> Generator[Conversation, None, Demonstration]:
        """Yields the conversation where its environment is to be asked."""
        turns, ids, written = solved_turns(solution), [], []
        talk = self._conversation(problem, turns)
        for number, turn in enumerate(turns, start=1):
            turn_ids = self._turn_ids(turn, number)
            ids += turn_ids
            written += [True] * len(turn_ids)
            if number == len(turns):
                break
            if talk is None:
                observed_ids = self._recorded(turn, turn_ids, number)
            else:
                talk.wrote(turn_ids)
                yield talk
                observed_ids = self._answered(talk, len(ids), number)
            ids += observed_ids
            written += [False] * len(observed_ids)
        return Demonstration(token_ids=tuple(ids), written_T=tuple(written))

    def _conversation(self, problem: Problem, turns: Sequence[SolvedTurn]) -> Conversation | None:
        """None where nothing is to be asked."""
        if len(turns) == 1 or turns[0].observed is not None:
            return None
        if self.rules is None or self.pool is None:
            raise BadTurns("no turn says what it observes, and the run has no environment to ask")
        return begin(self.rules, self.pool, [problem], [1])[0][0]

    def _turn_ids(self, turn: SolvedTurn, number: int) -> tuple[int, ...]:
        """The ids of a turn, with EOS unless a string ends it."""
        ids = tuple(self.tokenizer(turn.written, add_special_tokens=False)["input_ids"])
        if not self.rule.stopped(ids):
            ids = (*ids, self.tokenizer.eos_token_id)
        end = self.rule.end(ids, 0)
        if end != len(ids):
            text = self.tokenizer.decode(ids[:end], skip_special_tokens=False)[-20:]
            raise BadTurns(f"turn {number} ends after {text!r} in a rollout, and goes on here; begin a turn there")
        return ids

    def _recorded(self, turn: SolvedTurn, turn_ids: Sequence[int], number: int) -> tuple[int, ...]:
        assert turn.observed is not None
        most = self.rule.max_new_tokens if self.rules is None else self.rules.config.reply_tokens
        ids, cut = self.observer.text_ids(turn.observed, most_tokens=most)
        if cut:
            raise BadTurns(
                f"turn {number} observes more than {most} tokens; shorten it, or raise environment.reply_tokens"
            )
        return self.observer.framed(ids, last_id=turn_ids[-1])

    def _answered(self, talk: Conversation, position: int, number: int) -> tuple[int, ...]:
        ids = talk.observed(position)
        if ids is not None:
            return ids
        causes = {"length": "environment.max_turns or cold_start.max_length is reached"}
        cause = talk.failed or causes.get(talk.finish or "", "the environment ends the conversation")
        raise BadTurns(f"after turn {number} nothing is observed ({cause})")


@contextmanager
def demonstrator(policy: Policy, config: RunConfig) -> Iterator[Demonstrator]:
    """The maker of a run's demonstrations, and its environment's workers while the block lasts."""
    rule = StopRule.of(policy, replace(config.sampling, max_new_tokens=config.cold_start.max_length))
    if config.environment is None:
        yield Demonstrator(
            tokenizer=policy.tokenizer, rule=rule, observer=Observer.of(policy.tokenizer, None, config.model)
        )
        return
    pool = EnvironmentPool(config.environment)
    try:
        observer = Observer.of(policy.tokenizer, pool.environment.role, config.model)
        rules = TurnRules.of(config.environment, pool.environment, observer, rule)
        yield Demonstrator(tokenizer=policy.tokenizer, rule=rules.turn, observer=observer, rules=rules, pool=pool)
    finally:
        pool.close()
