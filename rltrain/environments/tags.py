"""What environments with a tagged call share: ``<tag>…</tag>`` asks, the reply stands in a format of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rltrain.config import EnvironmentConfig
from rltrain.errors import require

FIELD = "{}"


@dataclass(kw_only=True)
class ToolConfig(EnvironmentConfig):
    """Base of environments that the model calls as ``<tag>…</tag>``; a turn without a call ends the completion."""

    tag: str = "tool"  # the model writes <tag>…</tag>
    reply_format: str = "<result>{}</result>"  # what the model reads; {} is the result
    role: str | None = None  # null inserts replies as they are; tool or user makes each a message of this role
    call_reward: float = 0.0  # reward of a turn whose call gave a result

    def __post_init__(self) -> None:
        super().__post_init__()
        tagged = re.fullmatch(r"[^\s<>/]+", self.tag)
        require(bool(tagged), f"environment.tag={self.tag!r}: not a tag; set a word such as calc, without < and >")
        require(
            self.reply_format.count(FIELD) == 1,
            f"environment.reply_format={self.reply_format!r}: must hold {FIELD} once, where the result goes",
        )

    @property
    def opening(self) -> str:
        return f"<{self.tag}>"

    @property
    def closing(self) -> str:
        return f"</{self.tag}>"

    def call_in(self, text: str) -> str | None:
        """What stands between the last pair of tags of a turn; None where the last tag was not closed."""
        _, found, rest = text.rpartition(self.opening)
        inner, closed, _ = rest.partition(self.closing)
        return inner if found and closed else None

    def shown(self, result: str) -> str:
        """A result as the model reads it."""
        return self.reply_format.replace(FIELD, result)

    def told(self, cause: str) -> str:
        return self.shown(f"error: {cause}")

    def texts(self) -> Sequence[str]:
        return (self.opening, self.closing, self.reply_format.replace(FIELD, ""))


def cut(text: str, characters: int) -> str:
    """The first ``characters``, and how many more there were."""
    left = len(text) - characters
    return text if left <= 0 else f"{text[:characters]}\n[{left} more characters]"
