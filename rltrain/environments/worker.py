"""In a worker: an environment is built once and asked for replies, which leave as JSON. Imports no torch."""

from __future__ import annotations

import importlib
import json
import math
import time
import traceback
from collections.abc import Mapping
from typing import Any

from rltrain.types import Environment, Problem, Reply

STATE_BYTES = 2**18  # of a state as JSON
CHARACTERS_PER_TOKEN = 64  # a reply of more characters than this a token is longer than the longest observation

_built: list[tuple[Environment, int]] = []


def loaded(path: str) -> Any:
    """What ``module:name`` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def prepare(environment: str, config: str, settings: Mapping[str, Any]) -> None:
    """Build the environment that all later requests go to."""
    made = loaded(config)(**settings)
    built = loaded(environment)(made)
    built.prepare()
    _built[:] = [(built, CHARACTERS_PER_TOKEN * made.reply_tokens)]


def answer(kind: str, given: Any, text: str) -> dict[str, Any]:
    """The first state for a problem (``start``), or the reply to ``text`` in the state ``given``, and its seconds."""
    environment, longest = _built[0]
    return answered(environment, kind, given, text, longest)


def answered(environment: Environment, kind: str, given: Any, text: str, longest: int) -> dict[str, Any]:
    """As :func:`answer`; what the environment raises is its ``cause``, with the traceback."""
    begin = time.perf_counter()
    try:
        if kind == "start":
            reply = Reply(text="", state=environment.start(Problem(**given)))
        else:
            reply = environment.respond(given, text)
        plain = _plain(reply, kind, longest)
        plain["key"] = _key(environment, plain["state"])
    except MemoryError:
        raise
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        plain = {"failure": "error", "cause": cause, "trace": traceback.format_exc()[-4000:]}
    return plain | {"seconds": time.perf_counter() - begin}


def _plain(reply: Any, kind: str, longest: int) -> dict[str, Any]:
    if not isinstance(reply, Reply):
        raise TypeError(f"{kind} returned {type(reply).__name__}; return a Reply")
    if not isinstance(reply.text, str):
        raise TypeError(f"Reply.text is {type(reply.text).__name__}; give a text")
    if not isinstance(reply.reward, int | float) or not math.isfinite(reply.reward):
        raise ValueError(f"Reply.reward is {reply.reward!r}; give a finite number")
    state = json.dumps(reply.state, allow_nan=False)
    if len(state) > STATE_BYTES:
        raise ValueError(f"Reply.state has {len(state)} bytes as JSON; keep it below {STATE_BYTES}")
    text = reply.text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be tokenised
    return {
        "text": text[:longest],
        "state": json.loads(state),
        "done": bool(reply.done),
        "reward": float(reply.reward),
        "called": bool(reply.called),
        "failure": str(reply.failure) or ("too_long" if len(text) > longest else ""),
    }


def _key(environment: Environment, state: Any) -> str | None:
    key = environment.key(state)
    if key is not None and not isinstance(key, str):
        raise TypeError(f"key returned {type(key).__name__}; return a text or None")
    return key
