r"""The last ``\boxed{...}`` of a text."""

from __future__ import annotations

TAIL_CHARACTERS = 8192
OPENING = r"\boxed{"


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``, stripped; None if there is none or it never closes.

    Braces inside are matched. Only the last 8 KB are read, so that the time is bounded whatever the text.
    """
    text = text[-TAIL_CHARACTERS:]
    start = text.rfind(OPENING)
    if start < 0:
        return None
    start += len(OPENING)
    depth = 1
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start:end].strip()
    return None
