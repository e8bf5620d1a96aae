"""What a group is called: its prompt in a line, and how many of its completions were right."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rltrain.report.samples import SampleRow, reward, right_part
from rltrain.types import is_right

LONGEST, SHORT = 80, 24  # characters


def shortened(prompts: Sequence[str]) -> list[str]:
    """A line per prompt, cut in the middle, without what all begin or end with, such as a template."""
    begin, end = 0, 0
    if len(set(prompts)) > 1:
        begin = _up_to_a_blank(_common_start(prompts))
        end = _up_to_a_blank(_common_start([prompt[begin:][::-1] for prompt in prompts]))
    lines = [" ".join(prompt[begin : len(prompt) - end].split()) for prompt in prompts]
    half = LONGEST // 2
    return [line if len(line) <= LONGEST else f"{line[: half - 1]}…{line[-half:]}" for line in lines]


def _common_start(texts: Sequence[str]) -> str:
    same = [len(set(characters)) == 1 for characters in zip(*texts, strict=False)]
    return texts[0][: same.index(False) if False in same else len(same)]


def _up_to_a_blank(text: str) -> int:
    """The length of a long text up to its last blank, so that no word is cut. 0 for a short one."""
    return max(map(text.rfind, " \n")) + 1 if len(text) >= SHORT else 0


def outcome(rows: Sequence[SampleRow]) -> str:
    """How many completions were right, or the range of the rewards where they are not 0 or 1."""
    judged = [row.get(right_part(row)) for row in rows]
    scores = [float(value) for value in judged if value is not None and not math.isnan(value)]
    if scores and set(scores) <= {0.0, 1.0}:
        abstained = len(rows) - len(scores)
        return f"{sum(map(is_right, scores))} of {len(scores)} right" + (
            f", {abstained} abstained" if abstained else ""
        )
    counted = [value for value in map(reward, rows) if not math.isnan(value)]
    return f"rewards {min(counted):.3g} to {max(counted):.3g}" if counted else "no rewards"
