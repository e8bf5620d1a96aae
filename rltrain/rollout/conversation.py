"""One completion's conversation with its environment, whatever engine samples the model's turns.

    the model writes a turn -> the environment is asked -> its answer is observed, or the completion is over

An engine tells a conversation what the model wrote (:meth:`Conversation.wrote`) and reads what comes back
(:meth:`Conversation.observed`). In between :func:`carry` takes texts to the environment and answers from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rltrain.config import EnvironmentConfig
from rltrain.rollout.observations import Observer
from rltrain.rollout.stopping import StopRule
from rltrain.types import Completion, Environment, Finish, Problem, Reply, Turn

TOO_LONG = "too_long"


class Answer(Protocol):
    """What comes back from an environment: its reply, the key of the reply's state, and the seconds that it took."""

    @property
    def reply(self) -> Reply: ...

    @property
    def state_key(self) -> str | None: ...

    @property
    def latency_s(self) -> float: ...


class Answers(Protocol):
    """Who answers: futures, in order, that never raise. ``start`` gives first states as replies without text."""

    @property
    def environment(self) -> Environment: ...

    def start(self, problems: Sequence[Problem]) -> Sequence[Future[Any]]: ...

    def submit(self, requests: Sequence[tuple[Any, str]]) -> Sequence[Future[Any]]: ...


@dataclass(frozen=True, kw_only=True)
class TurnRules:
    """What the conversations of a rollout share.

    ``turn`` is where a turn ends: at a stop id, at a string of the environment's or of ``sampling.stop``. The latter,
    ``last``, end the completion, too.
    """

    config: EnvironmentConfig
    observer: Observer
    turn: StopRule
    last: StopRule
    most_tokens: int

    @classmethod
    def of(cls, config: EnvironmentConfig, environment: Environment, observer: Observer, rule: StopRule) -> TurnRules:
        """``rule`` is that of a completion without turns."""
        strings = tuple(dict.fromkeys((*rule.stop_strings, *environment.stop)))
        return cls(
            config=config,
            observer=observer,
            turn=replace(rule, stop_strings=strings),
            last=replace(rule, stop_ids=frozenset()),
            most_tokens=rule.max_new_tokens,
        )

    def of_turn(self, position: int) -> StopRule:
        """The rule of a turn that begins after ``position`` ids."""
        left = self.most_tokens - position
        return replace(self.turn, max_new_tokens=min(self.config.turn_tokens or left, left))


@dataclass(kw_only=True, slots=True)
class Conversation:
    """One completion between its turns.

    ``future`` is what the environment was asked for last. A completion that is continued has ``replayed``, texts of
    its ``earlier`` turns that the environment answers again, and ``begun``, the ids of the turn that is cut.
    """

    rules: TurnRules
    future: Future[Any] | None
    replayed: list[str] = field(default_factory=list)
    earlier: int = 0
    begun: tuple[int, ...] = ()
    turns: list[Turn] = field(default_factory=list)  # those that were answered
    finish: Finish | None = None  # None: it goes on
    failed: str = ""
    _state: Any = None
    _key: str | None = None  # of the state
    _lost: str = ""  # the failure that cost the state
    _turn: Turn | None = None  # the newest, which was not answered yet
    _ids: Sequence[int] = ()  # of that turn
    _asked: bool = False
    _answer: Any = None

    def fork(self, rules: TurnRules, begun: tuple[int, ...]) -> Conversation:
        """Another that goes on from where this one is, in the middle of a turn or at its begin."""
        assert self.future is None and not self.replayed
        return replace(self, rules=rules, begun=begun, turns=[], replayed=[])

    def wrote(self, turn_ids: Sequence[int]) -> None:
        """Take a turn that the model has ended, or that has no more room."""
        rule, whole_ids = self.rules.turn, (*self.begun, *turn_ids)
        self._turn, self._ids, self.begun = Turn(written=len(turn_ids), text=rule.text(whole_ids)), whole_ids, ()
        if not rule.stopped(whole_ids):
            self.finish = "length"

    @property
    def waits(self) -> bool:
        """Whether the model has ended a turn and has not read its answer."""
        return self._turn is not None and self.finish is None

    def next_request(self, *, wait: bool) -> tuple[Any, str] | None:
        """Take what came back, with ``wait`` once it does; then what to ask next, a state and a text."""
        if self.future is not None:
            if not (wait or self.future.done()):
                return None
            answer, self.future = self.future.result(), None
            if self._asked:
                self._answer = answer
            else:
                self._state, self._key = answer.reply.state, answer.state_key
                self._lost = self._lost or self._failure(answer.reply)
        if self._asked or self._lost:
            return None
        if self.replayed:
            return self._state, self.replayed.pop(0)
        if not self.waits:
            return None
        assert self._turn is not None
        self._asked = True
        return self._state, self._turn.text

    def observed(self, position: int) -> tuple[int, ...] | None:
        """The ids that the answer adds after ``position`` ids, or None where the completion is over."""
        assert self._turn is not None and self.future is None
        turn = replace(self._turn, state_key=self._key)
        if self._lost:
            return self._over(replace(turn, failure=self._lost), "stop", failed=self._lost)
        answer, self._answer, self._asked = self._answer, None, False
        reply, config = answer.reply, self.rules.config
        text, ids, failure = self._read(reply)
        turn = replace(turn, reward=reply.reward, called=reply.called, failure=failure, latency_s=answer.latency_s)
        if failure and config.on_failure != "tell":
            return self._over(turn, "stop", failed=failure)
        if reply.done or self.rules.last.stopped(self._ids):
            return self._over(turn, "stop")
        if self.earlier + len(self.turns) + 1 >= config.max_turns or position + len(ids) >= self.rules.most_tokens:
            return self._over(turn, "length")
        self.turns.append(replace(turn, observed=len(ids), reply=text))
        if not failure:  # what failed leaves the state as it was
            self._state, self._key = reply.state, answer.state_key
        self._turn = None
        return ids

    def _failure(self, reply: Reply) -> str:
        return "" if reply.failure == TOO_LONG and self.rules.config.long_reply == "cut" else reply.failure

    def _read(self, reply: Reply) -> tuple[str, tuple[int, ...], str]:
        """The text that the model reads, its ids between markers, and the failure."""
        config, observer = self.rules.config, self.rules.observer
        text, failure = reply.text, self._failure(reply)
        ids, cut = observer.text_ids(text, most_tokens=config.reply_tokens)
        if failure == TOO_LONG or (cut and not failure and config.long_reply == "fail"):
            text, failure = config.told(TOO_LONG), TOO_LONG
            ids, cut = observer.text_ids(text, most_tokens=config.reply_tokens)
        if cut:
            text = observer.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text, observer.framed(ids, last_id=self._ids[-1]), failure

    def _over(self, turn: Turn, finish: Finish, *, failed: str = "") -> None:
        self._turn, self.finish, self.failed = turn, finish, failed

    def completion(
        self, ids: Sequence[int], logprobs: Sequence[float], entropies: Sequence[tuple[float, float]] | None
    ) -> Completion:
        """The record of a conversation that is over and settled."""
        assert self._turn is not None and self.finish is not None
        last = replace(self._turn, state_key=self._key, failure=self._turn.failure or self._lost)
        failed = self.failed or self._lost  # a first state that failed costs also a completion that never asked
        return Completion(
            token_ids=tuple(ids),
            logprobs=tuple(logprobs),
            finish=self.finish,
            text="" if failed else last.text,  # no judge finds an answer in a turn that failed
            entropies=None if entropies is None else tuple(entropies),
            turns=(*self.turns, last),
            failed=failed,
            abstains=bool(failed) and self.rules.config.on_failure == "abstain",
        )


def carry(conversations: Sequence[Conversation], answers: Answers, *, wait: bool) -> None:
    """Take what came back and ask what is to be asked next; with ``wait`` until nothing is left to ask or take."""
    open_ones = list(conversations)
    while open_ones:
        asked = [(one, request) for one in open_ones if (request := one.next_request(wait=wait)) is not None]
        futures = answers.submit([request for _, request in asked]) if asked else []
        for (one, _), future in zip(asked, futures, strict=True):
            one.future = future
        open_ones = [one for one, _ in asked]


def begin(
    rules: TurnRules, answers: Answers, problems: Sequence[Problem], counts: Sequence[int]
) -> list[list[Conversation]]:
    """``counts[p]`` conversations about each problem, which share the request of its first state."""
    futures = answers.start(problems) if problems else []
    return [
        [Conversation(rules=rules, future=future) for _ in range(count)]
        for future, count in zip(futures, counts, strict=True)
    ]
