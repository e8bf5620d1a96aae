"""Replies of an environment while the run goes on: futures of what worker processes compute.

Every reply arrives: what the environment raises, a hang, a death or a megabyte is a :class:`~rltrain.types.Reply` with
``failure``. What a failure costs is ``environment.on_failure``, which the rollout applies.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import Any

from rltrain.config import EnvironmentConfig
from rltrain.environments.worker import CHARACTERS_PER_TOKEN, STATE_BYTES, answered
from rltrain.errors import RunError
from rltrain.registry import part_of
from rltrain.rewards.sandbox.pool import ChildReply, Limits, Pool
from rltrain.runtime import dist
from rltrain.types import Environment, Problem, Reply

log = logging.getLogger(__name__)

TARGET = "rltrain.environments.worker:answer"
REPLIES_OF_A_WORKER = 2000  # until it is replaced, so that what an environment leaks does not grow
SHOWN = 20  # causes of failures that are logged
CAUSE_CHARACTERS = 200
PROCESSES = 2**15  # libraries start threads, which count


@dataclass(frozen=True, kw_only=True)
class TimedReply:
    """A reply, ``Environment.key`` of its state, and the seconds of the environment's work, without the wait for it."""

    reply: Reply
    state_key: str | None = None
    latency_s: float = 0.0


@dataclass
class Failures:
    """Of the calls of one kind so far: how many, how many failed, and why the last did."""

    calls: int = 0
    failed: int = 0
    cause: str = ""

    def count(self, cause: str) -> None:
        """Another call; no ``cause`` is a success."""
        self.calls += 1
        if cause:
            self.failed, self.cause = self.failed + 1, cause


@dataclass(frozen=True, kw_only=True)
class _Request:
    kind: str
    given: Any
    text: str
    state: Any
    end: float
    future: Future[TimedReply]


class EnvironmentPool:
    """An environment and its workers. ``environment`` is built here too, to be asked for ``stop`` and ``role`` alone.

    A reply may take ``reply_timeout_s``, and with its wait for a worker ``batch_timeout_s`` from when it was submitted.
    States and problems go through JSON; what JSON has no form for in ``Problem.meta`` arrives as its text.
    """

    def __init__(self, config: EnvironmentConfig) -> None:
        part = part_of(config)
        self.config, self.name = config, part.name
        self.environment: Environment = part.function(config)
        self.starts, self.replies = Failures(), Failures()
        self._shown: set[str] = set()
        self._lock = threading.Lock()
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._children = None if config.replies_here() else _children(config)
        for index in range(config.workers):
            threading.Thread(target=self._work, name=f"rltrain-environment-{index}", daemon=True).start()

    def start(self, problems: Sequence[Problem]) -> list[Future[TimedReply]]:
        """The first state of each problem, in ``reply.state``."""
        return [self._submit("start", _plain(problem), "", None) for problem in problems]

    def submit(self, requests: Sequence[tuple[Any, str]]) -> list[Future[TimedReply]]:
        """The reply to each (state, text of the model's turn), in order."""
        return [self._submit("respond", state, text, state) for state, text in requests]

    def warm(self) -> None:
        """Start the first worker in the background."""
        if self._children is not None:
            self._children.warm()

    def close(self) -> None:
        """End the workers, when no request waits."""
        for _ in range(self.config.workers):
            self._requests.put(None)
        if self._children is not None:
            self._children.close()

    def refuse_broken(self) -> None:
        """``RunError`` on every rank if every reply so far failed on every rank, or without any every first state.

        All ranks call this together.
        """
        with self._lock:
            here = (replace(self.replies), replace(self.starts))
        for everywhere in zip(*dist.gather_objects(here, name="environment of the first batch"), strict=True):
            called = [each for each in everywhere if each.calls]
            if called and all(each.calls == each.failed for each in called):
                raise RunError(
                    f"environment {self.name}: failed on every call of the first step ({called[0].cause}); mend the "
                    "environment or its settings"
                )
            if called:
                return

    def _submit(self, kind: str, given: Any, text: str, state: Any) -> Future[TimedReply]:
        future: Future[TimedReply] = Future()
        end = time.monotonic() + self.config.batch_timeout_s
        self._requests.put(_Request(kind=kind, given=given, text=text, state=state, end=end, future=future))
        return future

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            try:
                request.future.set_result(self._reply(request))
            except Exception as error:  # whatever happens, the rollout must not be left waiting
                log.exception("environment %s: the reply was lost", self.name)
                cause = f"{type(error).__name__}: {error}"
                reply = Reply(text=self.config.told(cause), state=request.state, failure="error")
                request.future.set_result(TimedReply(reply=reply))

    def _reply(self, request: _Request) -> TimedReply:
        begin = time.monotonic()
        child = self._asked(request)
        plain = child.value if child.status == "ok" else self._failure(child)
        failure, cause = plain["failure"], plain.get("cause", "")
        if failure == "too_long":
            cause = f"a reply of more than {CHARACTERS_PER_TOKEN * self.config.reply_tokens} characters"
        elif failure and not cause:
            cause = plain["text"][:CAUSE_CHARACTERS]
        self._count(request.kind, failure, cause, plain.get("trace", ""))
        seconds = plain.get("seconds", time.monotonic() - begin)
        if "state" not in plain:
            reply = Reply(text=self.config.told(cause), state=request.state, failure=failure)
            return TimedReply(reply=reply, latency_s=seconds)
        fields = {name: plain[name] for name in ("text", "state", "done", "reward", "called", "failure")}
        return TimedReply(reply=Reply(**fields), state_key=plain["key"], latency_s=seconds)

    def _count(self, kind: str, failure: str, cause: str, trace: str) -> None:
        """Count the call, and log each cause once. A reply that is only cut has not failed."""
        told = f"{failure}: {cause}" if failure else ""
        counted = "" if failure == "too_long" and self.config.long_reply == "cut" else told
        with self._lock:
            (self.starts if kind == "start" else self.replies).count(counted)
            if not told or told in self._shown or len(self._shown) == SHOWN:
                return
            self._shown.add(told)
        log.warning("environment %s: %s%s", self.name, told, f"\n{trace.rstrip()}" if trace else "")

    def _asked(self, request: _Request) -> ChildReply:
        left_s = request.end - time.monotonic()
        if left_s <= 0:
            return ChildReply(status="skipped")
        if self._children is not None:
            return self._children.call(request.kind, request.given, request.text, wait_s=left_s, total_s=left_s)
        longest = CHARACTERS_PER_TOKEN * self.config.reply_tokens
        given = json.loads(json.dumps(request.given))  # as through a worker's pipe: nobody else's state changes
        try:
            value = answered(self.environment, request.kind, given, request.text, longest)
        except MemoryError:
            return ChildReply(status="memory")
        return ChildReply(status="ok", value=value)

    def _failure(self, child: ChildReply) -> dict[str, Any]:
        """How a worker failed, as the failure's name and its cause in words."""
        if child.status in ("timeout", "cpu"):
            return {"failure": "timeout", "cause": f"no reply within {self.config.reply_timeout_s:g} s"}
        if child.status == "skipped":
            return {"failure": "timeout", "cause": f"no worker was free within {self.config.batch_timeout_s:g} s"}
        if child.status == "memory":
            return {"failure": "memory", "cause": f"more than {self.config.memory_mib} MiB"}
        return {"failure": child.status, "cause": str(child.value)}


def _plain(problem: Problem) -> Any:
    prompt = problem.prompt if isinstance(problem.prompt, str) else [dict(message) for message in problem.prompt]
    fields = {"id": problem.id, "prompt": prompt, "answer": problem.answer, "meta": dict(problem.meta)}
    return json.loads(json.dumps(fields, default=str))


def _children(config: EnvironmentConfig) -> Pool:
    part = part_of(config)
    seconds = config.reply_timeout_s
    return Pool(
        TARGET,
        workers=config.workers,
        deadline_s=seconds,
        item_cpu_s=seconds,
        max_items=REPLIES_OF_A_WORKER,
        limits=Limits(
            memory_mib=config.memory_mib, cpu_s=int(REPLIES_OF_A_WORKER * (seconds + 1)), processes=PROCESSES
        ),
        prepare="prepare",
        prepared_with=[
            f"{part.function.__module__}:{part.function.__qualname__}",
            f"{part.config.__module__}:{part.config.__qualname__}",
            asdict(config),
        ],
        network=config.network,
        # A character takes at most 12 bytes as JSON, and the rest of a reply is small.
        reply_bytes=12 * CHARACTERS_PER_TOKEN * config.reply_tokens + STATE_BYTES + 2**16,
    )
