"""An environment of the library verifiers (its classic stack) as it is, for the problems of ``data=verifiers``.

A reply runs the environment's own ``rollout`` from the start, with a client that gives the turns so far. Where the
rollout wants another turn, what it added to the conversation is the reply. Where it ends, the rubric's reward is the
reward of the turn (reward part ``turn_rewards``).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rltrain.config import MISSING, DataConfig, EnvironmentConfig
from rltrain.data.mixture import MixtureConfig
from rltrain.data.verifiers import ROW, VerifiersDataConfig, check_library, library, load, message_text
from rltrain.errors import require
from rltrain.registry import register
from rltrain.types import Environment, Problem, Reply

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
MODEL = "policy"


@dataclass(kw_only=True)
class VerifiersConfig(EnvironmentConfig):
    """The same ``env_id`` and ``env_args`` as in ``data``. Set ``role=tool`` for an environment with tools.

    A tool call is a JSON object between ``<tool_call>`` and ``</tool_call>``. ``network=true`` is for rubrics that ask
    a judge. Each reply replays the turns before it, so an environment must be a function of its row and the turns.
    """

    env_id: str = MISSING  # of the environment, as vf.load_environment takes it
    env_args: dict[str, Any] = field(default_factory=dict)  # its arguments, by name
    role: str | None = "user"  # of what the environment says; tool for tools; null inserts it as it is
    memory_mib: int = 16384  # address space of a worker, which holds the library's data set

    def __post_init__(self) -> None:
        super().__post_init__()
        check_library(self.env_id, setting="environment")

    def check_data(self, key: str, data: DataConfig) -> None:
        sources = data.sources if isinstance(data, MixtureConfig) else {}
        for name, source in sources.items():
            self.check_data(f"{key}.sources.{name}", source)
        if isinstance(data, VerifiersDataConfig):
            for entry in ("env_id", "env_args"):
                here, there = getattr(self, entry), getattr(data, entry)
                require(
                    here == there,
                    f"environment.{entry}={here}: {key}.{entry} is {there}; give both the same, since the rows of one "
                    "environment are played by it",
                )


@register("environment", "verifiers", VerifiersConfig)
class Verifiers(Environment):
    """The state is the row and the turns so far."""

    def __init__(self, config: VerifiersConfig) -> None:
        self.config, self.role = config, config.role

    @cached_property
    def made(self) -> Any:
        """The library's environment, in a worker alone: it starts what it needs, and handles signals."""
        return load(self.config.env_id, json.dumps(self.config.env_args), "environment")

    def prepare(self) -> None:
        assert self.made

    def start(self, problem: Problem) -> Any:
        if ROW not in problem.meta:
            raise ValueError(f"problem {problem.id} is not of data=verifiers; choose that data")
        row = problem.meta[ROW]
        paused = asyncio.run(self._played(row, []))
        first = [message_text(message) for message in paused.messages]
        if not isinstance(paused, _Paused) or first != row["prompt"]:
            raise ValueError("the environment begins with other messages than its row has; give it a prompt in the row")
        return {"row": row, "texts": []}

    def respond(self, state: Any, text: str) -> Reply:
        texts = [*state["texts"], text]
        played = asyncio.run(self._played(state["row"], texts))
        called = bool(_CALL.search(text))
        following = state | {"texts": texts}
        if isinstance(played, _Paused):
            said = "\n".join(message_text(message)["content"] for message in played.added())
            return Reply(text=said, state=following, called=called)
        return Reply(text="", state=following, done=True, called=called, reward=float(played["reward"]))

    def key(self, state: Any) -> str:
        return json.dumps(state["texts"])

    async def _played(self, row: dict[str, Any], texts: Sequence[str]) -> Any:
        """The state of the library's rollout after its end, with its reward, or where it wants another turn."""
        try:
            state = await self.made.rollout(json.loads(json.dumps(row)), _client(texts), MODEL, {})
        except _Paused as paused:
            return paused
        if state["error"] is not None:
            raise state["error"]
        await self.made.rubric.score_rollout(state)
        return state


class _Paused(Exception):
    """The rollout wants a turn that was not written yet. ``prompts`` are the conversations of all its calls."""

    def __init__(self, prompts: Sequence[Sequence[Any]]) -> None:
        super().__init__()
        self.prompts = prompts

    @property
    def messages(self) -> Sequence[Any]:
        return self.prompts[-1]

    def added(self) -> Sequence[Any]:
        """What the environment said since the last turn; ``ValueError`` where it changed what was said before."""
        before = [message_text(message) for message in self.prompts[-2]]
        if [message_text(message) for message in self.messages[: len(before)]] != before:
            raise ValueError("the environment rewrites the conversation, which is sampled already; it cannot be used")
        return self.messages[len(before) + 1 :]


def _client(texts: Sequence[str]) -> Any:
    """A client of the library's whose model has written ``texts``."""
    types = library("verifiers.types")
    prompts: list[Sequence[Any]] = []

    def written(text: str, number: int) -> Any:
        calls = []
        for index, found in enumerate(_CALL.findall(text)):
            try:
                call = json.loads(found)
                name, arguments = str(call["name"]), json.dumps(call.get("arguments", {}))
            except (ValueError, KeyError):
                continue  # not a call: the environment sees the text alone
            calls.append(types.ToolCall(id=f"call_{number}_{index}", name=name, arguments=arguments))
        message = types.ResponseMessage(
            content=text, tool_calls=calls or None, finish_reason="stop", is_truncated=False
        )
        return types.Response(id=f"turn_{number}", created=0, model=MODEL, message=message)

    class Written(library("verifiers").Client):
        """Gives the turns in order, then pauses the rollout."""

        async def get_response(self, prompt: Any, *arguments: Any, **options: Any) -> Any:
            prompts.append(list(prompt))
            if len(prompts) > len(texts):
                raise _Paused(prompts)
            return written(texts[len(prompts) - 1], len(prompts))

        def _unused(self, *arguments: Any, **options: Any) -> Any:
            raise NotImplementedError

        setup_client = to_native_tool = to_native_prompt = get_native_response = _unused
        raise_from_native_response = from_native_response = close = _unused

    return Written(None)
