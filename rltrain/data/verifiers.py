"""Problems of an environment of the library verifiers: the rows of its data set, for ``environment=verifiers``.

    data=verifiers data.env_id=wordle environment=verifiers environment.env_id=wordle
    reward@rewards.answer=turn_rewards model.chat=true

Environments of the library's classic stack (``vf.Environment``, verifiers below 0.4) run as they are. Those of the v1
stack start agents of their own, whose model calls cannot be taken apart into turns.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from rltrain.config import MISSING, DataConfig
from rltrain.errors import ConfigError, require
from rltrain.registry import register
from rltrain.types import Problem

ROW = "verifiers_row"  # in Problem.meta: what the environment's rollout begins with
SHARES = {"train": (0.1, 1.0), "validation": (0.0, 0.1)}  # of the training rows
TOOLS = (
    "You may call these tools. A call is a JSON object between <tool_call> and </tool_call>, with its name and "
    'arguments: <tool_call>{{"name": "NAME", "arguments": {{}}}}</tool_call>\n{tools}'
)


def check_library(env_id: str, *, setting: str) -> None:
    """``ConfigError`` without the library's classic stack, or without the environment's module."""
    if importlib.util.find_spec("verifiers") is None:
        remedy = "pip install 'rltrain[verifiers]'"
        raise ConfigError(f"{setting}: needs the library verifiers, which is not installed; {remedy}")
    classic = importlib.util.find_spec("verifiers.legacy") or importlib.util.find_spec("verifiers.envs")
    require(
        classic is not None,
        f"{setting}: the installed verifiers has no classic stack (vf.Environment); pip install 'verifiers<0.4'",
    )
    module = env_id.replace("-", "_").split("/")[-1]
    require(
        env_id == MISSING or importlib.util.find_spec(module) is not None,
        f"{setting}.env_id={env_id}: no module named {module}; install the environment's package, or add its folder to "
        "PYTHONPATH",
    )


def library(name: str) -> Any:
    """A module of the library's, imported where it is needed."""
    return importlib.import_module(name)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """The library replaces the handlers of SIGINT and SIGTERM, which are the run's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@lru_cache(maxsize=4)
def load(env_id: str, env_args: str, setting: str) -> Any:
    """The library's environment, built with ``env_args`` (JSON); ``ConfigError`` where it cannot be."""
    try:
        with _signals_kept():
            made = library("verifiers").load_environment(env_id, **json.loads(env_args))
    except Exception as error:  # the environment is a user's and may raise anything
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{setting}.env_id={env_id}: {cause}; mend the environment or {setting}.env_args") from error
    if made.rubric.has_group_rewards:
        raise ConfigError(
            f"{setting}.env_id={env_id}: its rubric compares the rollouts of a group, which has no reward of one "
            "completion; leave those functions out of the rubric"
        )
    return made


@dataclass(kw_only=True)
class VerifiersDataConfig(DataConfig):
    """The training rows, of which a tenth are for validation; the test rows are the environment's for evaluation.

    Without these the test is the validation. Prompts are chat messages: set ``model.chat=true``. With ``tools`` the
    environment's tools are described in a system message, in the form that ``environment=verifiers`` reads.
    """

    env_id: str = MISSING  # of the environment, as vf.load_environment takes it
    env_args: dict[str, Any] = field(default_factory=dict)  # its arguments, by name
    tools: bool = True  # describe its tools in a system message

    def __post_init__(self) -> None:
        check_library(self.env_id, setting="data")


def message_text(message: Any) -> dict[str, str]:
    """Role and text of a message of the library's; ``ValueError`` for images and sound."""
    content = message["content"]
    if not isinstance(content, str):
        parts = content or []
        if any(part["type"] != "text" for part in parts):
            raise ValueError(f"a message of role {message['role']} holds more than text")
        content = "".join(part["text"] for part in parts)
    return {"role": message["role"], "content": content}


@register("data", "verifiers", VerifiersDataConfig)
def verifiers_problems(config: VerifiersDataConfig, split: str) -> Sequence[Problem]:
    """The rows of one split, in order."""
    made = load(config.env_id, json.dumps(config.env_args), "data")
    evaluates = split == "test" and (made.eval_dataset is not None or made.eval_dataset_source is not None)
    if evaluates:
        rows = made.get_eval_dataset()
    else:
        every = made.get_dataset()
        low, high = (round(share * len(every)) for share in SHARES["train" if split == "train" else "validation"])
        rows = every.select(range(low, high))
    require(len(rows) > 0, f"data.env_id={config.env_id}: has no row for {split}; give its data set more")
    tools = _tools(made) if config.tools else ""
    return [_problem(dict(row), tools, split) for row in rows]


def _tools(made: Any) -> str:
    described = [tool.model_dump(include={"name", "description", "parameters"}) for tool in made.tool_defs or []]
    return TOOLS.format(tools="\n".join(json.dumps(tool) for tool in described)) if described else ""


def _problem(row: Mapping[str, Any], tools: str, split: str) -> Problem:
    prompt = [message_text(message) for message in row["prompt"]]
    kept = {key: row[key] for key in ("answer", "info", "task", "example_id") if row.get(key) is not None}
    shown = prompt
    if tools and prompt[0]["role"] == "system":
        shown = [prompt[0] | {"content": f"{prompt[0]['content']}\n\n{tools}"}, *prompt[1:]]
    elif tools:
        shown = [{"role": "system", "content": tools}, *prompt]
    return Problem(
        id=f"{split}/{row['example_id']}",
        prompt=shown,
        answer=str(row.get("answer") or ""),
        meta={ROW: json.loads(json.dumps(kept | {"prompt": prompt}, default=str))},
    )
