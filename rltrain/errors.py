"""What a user is told when something cannot work; the command line prints these in one line."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the key, the cause and the remedy in one line."""


class RunError(RuntimeError):
    """A run that cannot go on; the message names the thing, the cause and the remedy in one line."""

    exit_code = 1


def require(condition: bool, message: str) -> None:
    """Raise ``ConfigError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def require_one_of(allowed: Iterable[str], key: str, value: str) -> None:
    """Raise a ``ConfigError`` that names the choices unless ``value`` is one of them."""
    require(value in allowed, f"{key}={value}: unknown; set one of {', '.join(allowed)}")


def require_date(key: str, text: str | None) -> None:
    """``ConfigError`` unless ``text`` is a date such as 2024-07-26, or there is none."""
    try:
        date.fromisoformat(text or "2024-07-26")
    except ValueError:
        raise ConfigError(f"{key}={text}: not a date; give it as 2024-07-26") from None
