"""Format reward: 1 for well-formed tags, whatever the answer. Also a spurious control ("format only")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rltrain.config import RewardConfig
from rltrain.errors import require
from rltrain.registry import register
from rltrain.rewards.verifier.extract import OPEN_THINK, boxes
from rltrain.types import Context, Group, Mean, Prompt, Scores


@dataclass(kw_only=True)
class FormatConfig(RewardConfig):
    """``tags`` in the order in which they must stand. ``box``: the text after them must hold one closed box."""

    tags: list[str] = field(default_factory=lambda: ["think", "answer"])
    box: bool = False

    def __post_init__(self) -> None:
        require(bool(self.tags) or self.box, "reward.tags=[]: nothing to check; name a tag or set box=true")
        require(len(set(self.tags)) == len(self.tags), f"reward.tags={self.tags}: a tag is named twice; name each once")


def opens_thinking(prompt: Prompt, tokenizer: Any = None) -> bool:
    """Whether the prompt ends with ``<think>``, in its text, its last message, or its token ids (chat template)."""
    text = prompt.problem.prompt
    if not isinstance(text, str):
        text = text[-1]["content"] if text else ""
    if text.rstrip().endswith(OPEN_THINK):
        return True
    return tokenizer is not None and tokenizer.decode(list(prompt.token_ids[-16:])).rstrip().endswith(OPEN_THINK)


def well_formed(text: str, tags: Sequence[str], *, prefilled: bool = False, box: bool = False) -> bool:
    """Exactly one pair of each tag, in order, non-blank inside, and only blanks before and between them.

    ``prefilled``: the prompt already holds the first opening tag, and a second one in ``text`` is a violation. After
    the last tag there may be text only where ``box`` asks for a box in it.
    """
    if prefilled and tags:
        text = f"<{tags[0]}>{text}"
    position = 0
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if text.count(opening) != 1 or text.count(closing) != 1:
            return False
        start, end = text.index(opening), text.index(closing)
        if start < position or text[position:start].strip() or not text[start + len(opening) : end].strip():
            return False
        position = end + len(closing)
    rest = text[position:]
    if box:
        closed = boxes(rest)
        return len(closed) == 1 and bool((closed[0].content or "").strip())
    return bool(rest.strip()) if tags == ["think"] else not rest.strip()


@register("reward", "format", FormatConfig)
def format_reward(groups: Sequence[Group], config: FormatConfig, context: Context) -> Scores:
    """1 for completions that are :func:`well_formed`, else 0."""
    scores = []
    for group in groups:
        prefilled = opens_thinking(group.prompt, context.tokenizer)
        texts = [completion.text for completion in group.completions]
        scores.append([float(well_formed(text, config.tags, prefilled=prefilled, box=config.box)) for text in texts])
    return Scores(scores=scores, metrics={"format/well_formed": Mean.of([score for row in scores for score in row])})
