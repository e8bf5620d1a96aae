"""A calculator with exact fractions: ``<calc>3*4/5</calc>`` is answered with ``<result>12/5</result>``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rltrain.environments.arithmetic import CalculationError, calculate
from rltrain.environments.tags import ToolConfig
from rltrain.registry import register
from rltrain.types import Environment, Problem, Reply


@dataclass(kw_only=True)
class CalculatorConfig(ToolConfig):
    """``+ - * / ^``, parentheses and decimals, exact; what has no value is answered with the cause, as ``error: …``."""

    tag: str = "calc"  # the model writes <calc>…</calc>
    reply_tokens: int = 32  # longest observation


@register("environment", "calculator", CalculatorConfig)
class Calculator(Environment):
    """The state is the list of results so far, which is its key: rows that got equal results are in equal states."""

    def __init__(self, config: CalculatorConfig) -> None:
        self.config = config
        self.stop, self.role = (config.closing,), config.role

    def start(self, problem: Problem) -> list[str]:
        return []

    def respond(self, state: Any, text: str) -> Reply:
        asked = self.config.call_in(text)
        if asked is None:
            return Reply(text="", state=state, done=True)
        try:
            result, reward = calculate(asked), self.config.call_reward
        except CalculationError as error:
            result, reward = f"error: {error}", 0.0
        return Reply(text=self.config.shown(result), state=[*state, result], called=True, reward=reward)

    def key(self, state: Any) -> str:
        return " ".join(state)
