"""Problems as token ids: chat templates, limits of length."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Sequence
from datetime import date
from typing import Any

import jinja2

from rltrain.config import ModelConfig, SamplingConfig
from rltrain.errors import ConfigError, require
from rltrain.policy.capabilities import most_positions
from rltrain.policy.load import Policy
from rltrain.policy.tokenizer import CLOCK, text_ids
from rltrain.types import AdvisedProblem, Message, Problem, Prompt, TokenProblem

SYSTEM_ROLES = ("system", "developer")
LIMITS = "sampling.max_prompt_tokens, or the model's positions less sampling.max_new_tokens"


UNDATED = (
    "model.template_date: the chat template writes the date into every prompt, so that a run would differ from day to "
    "day; set one, for example model.template_date=2024-07-26"
)


class BadPrompt(ConfigError):
    """A problem that the chat template refuses; it is left out like any bad row."""


def encode(policy: Policy, problem: Problem, config: ModelConfig) -> Prompt:
    """A problem as token ids; chat messages (or text with ``config.chat``) go through the tokenizer's template."""

    def render(prompt: str | Sequence[Message]) -> tuple[int, ...]:
        try:
            return prompt_ids(policy.tokenizer, prompt, config)
        except BadPrompt as error:
            raise BadPrompt(f"{problem.id}: {error}") from error

    if isinstance(problem, TokenProblem):
        return problem.encode(policy.tokenizer, render)
    if isinstance(problem, AdvisedProblem) and problem.as_system:
        _refuse_lost_system(problem, config)
    ids = render(problem.prompt)
    if not isinstance(problem, AdvisedProblem):
        return Prompt(problem=problem, token_ids=ids)
    return Prompt(problem=problem, token_ids=ids, handbook_tokens=len(ids) - len(render(problem.bare)))


def _refuse_lost_system(problem: AdvisedProblem, config: ModelConfig) -> None:
    """A message of the handbook's would stand in the place of ``model.system``, and needs a chat template."""
    setting = "data.handbook_place=system"
    other = "set data.handbook_place=question, or"
    has_template = config.chat or not isinstance(problem.bare, str)
    require(has_template, f"{setting}: a system message needs a chat template; {other} model.chat=true")
    require(
        config.system is None,
        f"{setting}: would stand in the place of model.system; {other} put that text into data.handbook_template and "
        "unset model.system",
    )


def prompt_ids(tokenizer: Any, prompt: str | Sequence[Message], config: ModelConfig) -> tuple[int, ...]:
    """The ids of a text or of chat messages: begun as the tokenizer begins a text, once, and without its end."""
    if isinstance(prompt, str) and not config.chat:
        return text_ids(tokenizer, prompt)
    text = chat_text(tokenizer, turns(prompt, config), config)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadPrompt("its text holds half a character (a lone surrogate)") from error
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def turns(prompt: str | Sequence[Message], config: ModelConfig) -> list[dict[str, Any]]:
    """System messages, the examples, the prompt. A row's own system message stands for ``config.system``."""
    rest = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    head = list(itertools.takewhile(lambda turn: turn["role"] in SYSTEM_ROLES, rest))
    rest = rest[len(head) :]
    if config.examples and not rest:
        raise BadPrompt("it holds system messages only, so that the last of model.examples would be continued")
    if config.system is not None and not head:
        head = [{"role": "system", "content": config.system}]
    for question, answer in config.examples:
        head += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return head + rest


def chat_text(tokenizer: Any, messages: Sequence[dict[str, Any]], config: ModelConfig) -> str:
    """Messages through the chat template, to be answered, or continued where the assistant has the last word."""
    require(
        tokenizer.chat_template is not None,
        "data.messages: the tokenizer has no chat template; put the chat model's chat_template.jinja beside it, or "
        "make the prompt of text columns (data.prompt)",
    )
    template = tokenizer.get_chat_template(tools=config.chat_template_kwargs.get("tools"))
    template = _with_fixed_clock(template, config.template_date) if CLOCK in template else template
    continued = messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            **config.chat_template_kwargs,
        )
    except Exception as error:  # a template is a program, and fails in as many ways
        require(UNDATED not in str(error), UNDATED)
        cause = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise BadPrompt(f"the chat template refuses its messages ({cause}); {_remedy(messages, config)}") from error


def _with_fixed_clock(template: str, day: str | None) -> str:
    """The template with a macro instead of the clock: ``day`` in the formats it spells, or an error where it asks."""
    if day is None:
        return _macro(f"raise_exception({UNDATED!r})") + template
    tokens = jinja2.Environment().lex(template)
    strings = [text.replace("\n", "\\n") for _, kind, text in tokens if kind == "string" and "%" in text]
    formats = {ast.literal_eval(text) for text in strings}
    dates = {style: date.fromisoformat(day).strftime(style) for style in sorted(formats)}
    unknown = "raise_exception('it makes up its date format, which model.template_date cannot follow')"
    return _macro(f"{dates!r}[format] if format in {dates!r} else {unknown}") + template


def _macro(expression: str) -> str:
    return f"{{%- macro {CLOCK}(format) -%}}{{{{ {expression} }}}}{{%- endmacro -%}}"


def _remedy(messages: Sequence[dict[str, Any]], config: ModelConfig) -> str:
    if config.system is not None and messages[0].get("content") == config.system:
        return "if it knows no system role, unset model.system and put that text into data.prompt"
    if messages[0]["role"] in SYSTEM_ROLES:
        return "if it knows no system role, move that message's text into the user's"
    return "check the roles of data.messages and model.examples against the template"


def encode_all(
    policy: Policy, problems: Sequence[Problem], config: ModelConfig, *, max_prompt_tokens: int
) -> tuple[list[Prompt], list[Problem]]:
    """Prompts within the limit, and the problems left out: longer, empty, or refused by the chat template."""
    prompts: list[Prompt] = []
    dropped: list[Problem] = []
    for problem in problems:
        prompt = _encoded(policy, problem, config)
        if prompt is not None and 0 < len(prompt.token_ids) <= max_prompt_tokens:
            prompts.append(prompt)
        else:
            dropped.append(problem)
    return prompts, dropped


def _encoded(policy: Policy, problem: Problem, config: ModelConfig) -> Prompt | None:
    try:
        return encode(policy, problem, config)
    except BadPrompt:
        return None


def why_left_out(policy: Policy, problem: Problem, config: ModelConfig, *, max_prompt_tokens: int) -> str:
    """Of a problem that :func:`encode_all` left out: its id and the reason."""
    try:
        prompt = encode(policy, problem, config)
    except BadPrompt as error:
        return str(error)
    if not prompt.token_ids:
        return f"{problem.id}: makes no prompt"
    return f"{problem.id}: {len(prompt.token_ids)} tokens, over {max_prompt_tokens} ({LIMITS})"


def refuse_long_entries(
    policy: Policy, dropped: Sequence[Problem], config: ModelConfig, *, max_prompt_tokens: int, limits: str = LIMITS
) -> None:
    """``ConfigError`` where a problem that was left out is too long because of a handbook's entries alone."""
    for problem in dropped:
        if not isinstance(problem, AdvisedProblem) or not problem.behaviours:
            continue
        prompt = _encoded(policy, problem, config)
        if prompt is not None and 0 < len(prompt.token_ids) - prompt.handbook_tokens <= max_prompt_tokens:
            raise ConfigError(
                f"{problem.rows}: add {prompt.handbook_tokens} tokens to problem {problem.id}, whose prompt of "
                f"{len(prompt.token_ids)} is then over {max_prompt_tokens} ({limits}); lower data.handbook_top, "
                "shorten these rows, or raise the limit"
            )


def prompt_limit(policy: Policy, sampling: SamplingConfig) -> int:
    """``sampling.max_prompt_tokens``, or what the model's positions leave beside ``max_new_tokens`` if that is less."""
    known = most_positions(policy.model.config.get_text_config())
    if known is None:
        return sampling.max_prompt_tokens
    if known <= sampling.max_new_tokens:
        raise ConfigError(
            f"sampling.max_new_tokens={sampling.max_new_tokens}: leaves no room for a prompt in the model's "
            f"{known} positions; lower it"
        )
    return min(sampling.max_prompt_tokens, known - sampling.max_new_tokens)
