"""A row's columns as text, options and chat messages; what cannot be one of them is a bad row with its reason."""

from __future__ import annotations

import datetime
import math
import re
import string
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

Row = Mapping[str, Any]
LETTER_KEYS = ("key", "label", "letter")
TEXT_KEYS = ("value", "text", "option")
LAST_ROLES = ("assistant", "user", "tool", "function", "ipython", "system", "developer")


class BadRow(ValueError):
    """Why a row cannot be a problem."""


def value_at(row: Row, path: str) -> Any:
    """The non-empty value at a dotted path, whose numbers count a list's elements from 0: ``answers.text.0``.

    Bad: nothing, blank text, an empty list or object, NaN, and text that UTF-8 cannot hold.
    """
    value: Any = row.get(path)
    if value is None:
        value = row
        for part in path.split("."):
            value = _child(value, part)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow(f"empty {path}")
    if isinstance(value, (list, tuple, Mapping)) and not value:
        raise BadRow(f"empty {path}")
    if isinstance(value, (float, Decimal)) and math.isnan(value):
        raise BadRow(f"{path} is NaN")
    if isinstance(value, str):
        _require_encodable(value, path)
    return value


def _child(value: Any, part: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(part)
    if isinstance(value, (list, tuple)) and part.isdecimal():
        return value[int(part)] if int(part) < len(value) else None
    return None


def _require_encodable(text: str, path: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{path} holds half a character (a lone surrogate)") from error


def text_of(value: Any, path: str, *, instead: str = "") -> str:
    """A scalar as text: a float without a fraction prints as the integer (5.0 is "5"), others as Python does.

    ``instead`` is what else a user could do with a list or an object, for the message.
    """
    if isinstance(value, str):
        _require_encodable(value, path)
        return value
    if isinstance(value, (float, Decimal)):
        return _number(value, path)
    if isinstance(value, (bool, int, datetime.date, datetime.time, datetime.timedelta)):
        return str(value)
    if isinstance(value, (list, tuple)):
        raise BadRow(f"{path} is a list, not text ({_list_remedy(value, path)}{instead})")
    if isinstance(value, Mapping):
        raise BadRow(f"{path} is an object, not text (name one of its fields: {path}.FIELD{instead})")
    raise BadRow(f"{path} is {type(value).__name__}, not text")


def _number(value: float | Decimal, path: str) -> str:
    if not math.isfinite(value):
        raise BadRow(f"{path} is {value}, not a finite number")
    if isinstance(value, Decimal):
        return format(value, "f")
    return str(int(value)) if value == int(value) else repr(value)


def _list_remedy(values: Sequence[Any], path: str) -> str:
    if isinstance(values[0], Mapping) and "role" in values[0]:
        return f"messages: set data.messages={path} and data.prompt=null"
    return f"name an element: {path}.0"


def options_at(row: Row, path: str) -> dict[str, str]:
    """Letter to text of the options in a column; see :func:`lettered`."""
    return lettered(value_at(row, path), path)


def lettered(options: Any, path: str) -> dict[str, str]:
    """Options as letter to text; an option without a text is none.

    Forms: ``{A: text}``, ``[text]`` (lettered A, B, …), ``[{key, value}]`` with ``label`` or ``letter`` for the key and
    ``text`` or ``option`` for the value, and columns of these, ``{label: […], text: […]}``.
    """
    found: dict[str, str] = {}
    for letter, text in _pairs(options, path):
        if text is None:
            continue
        name = text_of(letter, f"a letter of {path}").strip()
        if name in found:
            raise BadRow(f"{path} has two options {name}")
        found[name] = text_of(text, f"option {name} of {path}")
    if not found:
        raise BadRow(f"empty {path}")
    return found


def _pairs(options: Any, path: str) -> list[tuple[Any, Any]]:
    if isinstance(options, Mapping):
        letters, texts = _field(options, LETTER_KEYS), _field(options, TEXT_KEYS)
        if isinstance(letters, (list, tuple)) and isinstance(texts, (list, tuple)):
            if len(letters) != len(texts):
                raise BadRow(f"{path} has not as many letters as texts")
            return list(zip(letters, texts, strict=True))
        return list(options.items())
    if not isinstance(options, (list, tuple)):
        raise BadRow(f"{path} is neither a list nor an object of options")
    if all(isinstance(option, Mapping) for option in options):
        pairs = [(_field(option, LETTER_KEYS), _field(option, TEXT_KEYS)) for option in options]
        if any(letter is None for letter, _ in pairs):
            raise BadRow(f"an option of {path} has no key and value")
        return pairs
    if len(options) > len(string.ascii_uppercase):
        raise BadRow(f"{path} has {len(options)} options, more than letters")
    return list(zip(string.ascii_uppercase, options, strict=False))


def _field(option: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((option[name] for name in names if option.get(name) is not None), None)


def require_option(answer: str, options: Mapping[str, str], path: str) -> None:
    """A gold must be an option's letter or text, or no completion could ever be right."""
    letters = {letter.upper() for letter in options}
    words = {word.upper() for word in re.findall(r"\w+", answer)}
    texts = {_plain(text) for text in options.values()}
    if not words & letters and _plain(answer) not in texts:
        raise BadRow(f"{path} is none of the row's options")


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+|[^\w\s]", text.casefold()))


def messages_at(row: Row, path: str, *, continued: bool) -> list[dict[str, Any]]:
    """The chat messages in a column: ``role``, ``content`` as text, and what else a message holds, for the template.

    Text parts are joined as chat templates join them, without a separator. A conversation that ends with the assistant
    is refused unless it is ``continued``, and so is a last role of another name, which may be the assistant's.
    """
    values = value_at(row, path)
    if not isinstance(values, (list, tuple)) or not all(isinstance(one, Mapping) and "role" in one for one in values):
        raise BadRow(f"{path} is no list of messages with role and content")
    messages = [_message(message, f"message {number} of {path}") for number, message in enumerate(values)]
    last = messages[-1]["role"]
    if last not in LAST_ROLES:
        raise BadRow(f"{path} ends with the unknown role {last!r} (rename it to one of {', '.join(LAST_ROLES)})")
    if last == "assistant":
        if messages[-1].get("tool_calls"):
            raise BadRow(f"{path} ends with tool calls: there is nothing to answer")
        if not continued:
            raise BadRow(
                f"{path} ends with the assistant, whose text would stand in the prompt (cut it off, or have it "
                "continued: data.continue_final_message=true)"
            )
    return messages


def _message(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    role = text_of(message["role"], f"the role of {place}")
    extras = {key: _without_nulls(value) for key, value in message.items() if value is not None}
    content = message.get("content")
    called = bool(message.get("tool_calls"))
    if content is None and not called:
        raise BadRow(f"{place} has no content")
    text = "" if content is None else _content(content, place)
    if not text.strip() and role in ("user", "assistant") and not called:
        raise BadRow(f"{place} is empty")
    return extras | {"role": role, "content": text}


def _content(content: Any, place: str) -> str:
    if not isinstance(content, (list, tuple)):
        return text_of(content, place)
    return "".join(_part(part, place) for part in content)


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return text_of(part, place)
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or part.get("text") is None:
        raise BadRow(f"{place} holds a part that is no text ({kind})")
    return text_of(part["text"], place)


def _without_nulls(value: Any) -> Any:
    """Tables fill the fields that a struct lacks with null; a template would print them."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(each) for each in value]
    return value
