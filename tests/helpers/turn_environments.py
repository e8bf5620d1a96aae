"""Environments for the local engine of ``local_engine``, and answers that arrive at once, at last, or at any time."""

import random
from concurrent.futures import Future
from dataclasses import dataclass

from local_engine import PROMPTS, Policy, engine, model, tokenizer

from rltrain.config import EnvironmentConfig, ModelConfig, SamplingConfig
from rltrain.rollout.turns import TurnRollout
from rltrain.types import Environment, Reply

SAMPLING = SamplingConfig(max_new_tokens=40)


class Lengths(Environment):
    """Answers "=" and "+" with the number of the turn and the length of its text; any other turn is the last."""

    stop = ("=", "+")
    role = None

    def start(self, problem):
        return {"problem": problem.id, "turn": 1}

    def respond(self, state, text):
        called = text.endswith(self.stop)
        after = state | {"turn": state["turn"] + 1}
        return Reply(
            text=f" {state['turn']} {len(text)}." if called else "",
            state=after,
            done=not called,
            reward=len(text) / 8,
            called=called,
        )

    def key(self, state):
        return f"{state['problem']}/{state['turn']}"


@dataclass(frozen=True)
class Timed:
    reply: Reply
    state_key: str | None = None
    latency_s: float = 0.25


class Late(Future):
    """Done when it is waited for, or when ``arrives`` says so."""

    def __init__(self, compute, arrives):
        super().__init__()
        self.compute, self.arrives = compute, arrives

    def done(self):
        if not super().done() and self.arrives():
            self.set_result(self.compute())
        return super().done()

    def result(self, timeout=None):
        if not super().done():
            self.set_result(self.compute())
        return super().result(timeout)


ARRIVALS = {"at once": lambda: True, "at last": lambda: False, "at any time": lambda: random.random() < 0.3}


class Here:
    """Answers of an environment in this process. ``asked`` are the texts, in the order in which they came."""

    def __init__(self, environment, arrival="at once"):
        self.environment, self.arrives, self.asked, self.pending = environment, ARRIVALS[arrival], [], []

    def start(self, problems):
        return [self._late(lambda problem=problem: self._first(problem)) for problem in problems]

    def submit(self, requests):
        self.asked += [text for _, text in requests]
        return [self._late(lambda each=each: self._reply(*each)) for each in requests]

    def _late(self, compute):
        self.pending.append(Late(compute, self.arrives))
        return self.pending[-1]

    def _first(self, problem):
        state = self.environment.start(problem)
        return Timed(Reply(text="", state=state), self.environment.key(state))

    def _reply(self, state, text):
        reply = self.environment.respond(state, text)
        return Timed(reply, self.environment.key(reply.state))


class InRounds:
    """Any engine, as far as a conversation knows: the local one by its continuations alone."""

    def __init__(self, inner):
        self.continue_ = inner.continue_


def talking(
    name="qwen3", *, environment=None, arrival="at once", rounds=False, answers=None, sampling=SAMPLING, **keys
):
    """A rollout over turns; keys of ``EnvironmentConfig`` and of the local engine."""
    of_environment = {key: keys.pop(key) for key in list(keys) if key in EnvironmentConfig.__dataclass_fields__}
    config = EnvironmentConfig(**{"reply_tokens": 12, "max_turns": 4} | of_environment)
    inner = engine(name, **keys)
    inner._sampling = sampling
    answers = answers or Here(environment or Lengths(), arrival)
    policy = Policy(model(name), tokenizer())
    return TurnRollout(
        InRounds(inner) if rounds else inner, answers, config, sampling, policy, model=ModelConfig(), seed=7
    )


def talked(rollout, prompts=PROMPTS, **keys):
    return rollout.generate(prompts, **{"step": 3, "group_size": 4} | keys)
