"""Signs of bad reasoning that a completion shows by itself: repetition, and a thought that its answer contradicts.

Both after Yao et al. (arXiv 2505.23646), who find them in models whose answers are made up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rltrain.data.boxed import last_boxed
from rltrain.rewards.verifier.number import parse_number, same_number
from rltrain.types import Group, Mean, Metrics

NGRAM = 10
OPENING, THINK_CLOSE = r"\boxed{", "</think>"
# A minus behind an operand is an operator.
_NUMBER = re.compile(
    r"(?:(?<![\w)}\]])-\s*)?(?:\\d?frac\s*\{\d+\}\s*\{\d+\}|(?<![\d.])\d+(?:,\d{3})*(?:\.\d+)?(?:\s*/\s*\d+)?)"
)


def repeat_share(token_ids: Sequence[int], *, size: int = NGRAM) -> float:
    """Share of the tokens that lie in a run of ``size`` and more which stood earlier in the completion; 0 of none.

    A token counts if any ``size`` tokens in a row that hold it equal ``size`` tokens with an earlier start, which they
    may overlap.
    """
    seen: set[tuple[int, ...]] = set()
    repeated, counted_to = 0, 0
    for start in range(len(token_ids) - size + 1):
        gram = tuple(token_ids[start : start + size])
        if gram in seen:
            repeated += start + size - max(start, counted_to)
            counted_to = start + size
        seen.add(gram)
    return repeated / len(token_ids) if len(token_ids) else 0.0


def think_answer_mismatch(text: str) -> bool | None:
    r"""Whether the last number of the thought is another than the final answer, the content of the last ``\boxed{}``.

    The thought is what stands before ``</think>``, else before that box. Numbers are compared as the verifier does.
    None where there is no box, its content is no number, or the thought holds none.
    """
    answer = last_boxed(text)
    gold = None if answer is None else parse_number(answer)
    before = text[: text.rfind(OPENING)] if answer is not None else ""
    thought = before.rpartition(THINK_CLOSE)[0] or before
    stated = _NUMBER.findall(thought)
    value = parse_number(stated[-1]) if stated else None
    if gold is None or value is None:
        return None
    return not same_number(gold, value)


def sign_metrics(groups: Sequence[Group]) -> Metrics:
    """Over completions: the mean share of repeated tokens, and the share of mismatches where there is a number twice.

    Of a completion with turns, only what the model wrote.
    """
    completions = [completion for group in groups for completion in group.completions]
    mismatches = [think_answer_mismatch(completion.text) for completion in completions]
    return {
        "completions/repeat_share": Mean.of([repeat_share(completion.written_ids) for completion in completions]),
        "completions/think_answer_mismatch": Mean.of([each for each in mismatches if each is not None]),
    }
