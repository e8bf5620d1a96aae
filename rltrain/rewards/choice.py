"""Multiple choice (MedQA, MedMCQA): which option does the completion choose?

A letter in a box or an ``<answer>`` tag, ``(C) text``, or the text of exactly one option. A bare letter is that letter,
also where another option's text is a letter. A letter and a text that disagree, several letters, a negation or a number
are wrong; letters in the prose are never read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rltrain.config import RewardConfig
from rltrain.data.columns import lettered
from rltrain.registry import register
from rltrain.rewards.format import opens_thinking
from rltrain.rewards.math import Verdict
from rltrain.rewards.verifier.compare import compare
from rltrain.rewards.verifier.extract import OPEN_THINK, TAIL_CHARACTERS, after_thinking, answer_line, boxed, boxes
from rltrain.rewards.verifier.text import clean_latex, normalise
from rltrain.rewards.verifier.values import Outcome
from rltrain.types import Context, Group, Mean, Scores

MAX_CHARACTERS = 1024

_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_LETTER = re.compile(r"[\s(\[{*]*([A-Za-z])[\s)\]}*]*(?:[.:,\-][\s*]*)?")
_LETTER_TEXT = re.compile(
    r"(?:\(\s*([A-Za-z])\s*\)|\[\s*([A-Za-z])\s*\]|([A-Za-z])\s*[).:,]|([A-Za-z])\s+-)[\s*:.\-]*(?P<text>\S.*)",
    re.DOTALL,
)
_LETTER_BLANK_TEXT = re.compile(r"([A-Z])\s+(?P<text>\S.*)", re.DOTALL)  # only where the options are known
_PREFIX = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+|final\s+|best\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*)+(?=[(\[*A-Za-z])", re.I
)
_MATHEMATICS = re.compile(r"[\d\\^]")
_NEGATION = re.compile(
    r"\b(?:not|isn'?t|never|wrong|incorrect|false|except|neither|nor|cannot|rule[sd]? out)\b", re.IGNORECASE
)


def options_of(meta: Mapping[str, object]) -> dict[str, str]:
    """``meta["choices"]`` or ``meta["options"]`` as letter -> text, in any form that :func:`lettered` reads."""
    options = meta.get("choices") or meta.get("options")
    return {letter.upper(): text for letter, text in lettered(options, "options").items()} if options else {}


def verify_choice(
    completion: str, gold: str, options: Mapping[str, str] | None = None, *, strict: bool = True
) -> Verdict:
    """1 if the completion chooses the gold, a letter or the text of one option; lenient reads answer lines too."""
    options = {letter.upper(): text for letter, text in (options or {}).items()}
    expected = _gold_letter(gold, options)
    if expected is None:
        return Verdict(score=None, status="gold_error", extracted=None, reason="gold is not one of the options")
    text, reason = _extract(completion, strict)
    if text is None:
        return Verdict(score=0.0, status="no_answer", extracted=None, reason=reason)
    if len(text) > MAX_CHARACTERS:
        return Verdict(score=0.0, status="parse_error", extracted=text[:MAX_CHARACTERS], reason="answer too long")
    chosen, reason = chosen_letter(text, options)
    if chosen is None:
        return Verdict(score=0.0, status="parse_error", extracted=text, reason=reason)
    return Verdict(score=float(chosen == expected), status="ok", extracted=text, reason=f"chose {chosen}")


def _gold_letter(gold: str, options: Mapping[str, str]) -> str | None:
    letter = _LETTER.fullmatch(gold)
    if letter and (not options or letter[1].upper() in options):
        return letter[1].upper()
    chosen, _ = chosen_letter(gold, options)
    return chosen


def _extract(completion: str, strict: bool) -> tuple[str | None, str]:
    """The last ``<answer>`` or box, whichever stands later; an answer tag left open is no answer."""
    text, reason = after_thinking(completion)
    if text is None:
        return None, reason
    tail = text[-TAIL_CHARACTERS:]
    tags = list(_TAG.finditer(tail))
    if tail.rfind("<answer>") > (tags[-1].start() if tags else -1):
        return None, "answer tag never closed"
    found = boxes(tail)
    if found and (not tags or found[-1].start > tags[-1].end()):
        answers = boxed(tail).answers
        return (", ".join(answers), "") if answers else (None, "box never closed")
    if tags:
        return " ".join(tags[-1][1].split()), ""
    line = () if strict else answer_line(tail).answers
    return (line[0], "") if line else (None, "no box or answer tag")


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w.%+\-/]+", " ", _clean(text).casefold()).split()).strip(" .")


def _clean(text: str) -> str:
    return re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", clean_latex(normalise(text))).replace("\\%", "%").strip(" *")


def chosen_letter(text: str, options: Mapping[str, str]) -> tuple[str | None, str]:
    """``(letter, "")`` or ``(None, why)``."""
    inner = boxes(text)
    text = _clean((inner[-1].content or "") if inner else text)
    letter = _LETTER.fullmatch(text)
    if letter and letter[1].upper() in options:
        return letter[1].upper(), ""
    same = _with_text(text, options)
    if same:
        return (same[0], "") if len(same) == 1 else (None, "several options have this text")
    text = _PREFIX.sub("", text, count=1)
    letter = _LETTER.fullmatch(text)
    if letter:
        return _known(letter[1], options)
    found = _LETTER_TEXT.fullmatch(text) or (_LETTER_BLANK_TEXT.fullmatch(text) if options else None)
    if not found:
        return None, "neither a letter nor the text of one option"
    chosen, reason = _known(next(group for group in found.groups() if group), options)
    return (chosen, reason) if chosen is None else _agreeing(chosen, found["text"], options)


def _with_text(text: str, options: Mapping[str, str]) -> list[str]:
    """The options that are this text, or, of mathematics, that have this value."""
    if not _plain(text):
        return []
    same = [letter for letter, option in options.items() if _plain(option) == _plain(text)]
    return same or [letter for letter, option in options.items() if _same_value(option, text)]


def _same_value(option: str, text: str) -> bool:
    if not _MATHEMATICS.search(option) or not _MATHEMATICS.search(text):
        return False
    try:
        return compare(_clean(option), _clean(text)) is Outcome.RIGHT
    except RecursionError:
        return False


def _known(letter: str, options: Mapping[str, str]) -> tuple[str | None, str]:
    letter = letter.upper()
    return (None, f"no option {letter}") if options and letter not in options else (letter, "")


def _agreeing(letter: str, text: str, options: Mapping[str, str]) -> tuple[str | None, str]:
    """The letter, if the text after it is its option's, or begins that option and no other.

    With unknown options, any text that neither denies nor lists.
    """
    if options:
        agrees = letter in _with_text(text, options) or _begins(text, options) == [letter]
        return (letter, "") if agrees else (None, "letter and text disagree")
    if _NEGATION.search(text) or re.search(r"\b(?:or|and)\b\W*[A-Z]\b|(?:^|[\s(,])[A-Z][).:]", text):
        return None, "negation or list"
    return letter, ""


def _begins(text: str, options: Mapping[str, str]) -> list[str]:
    return [letter for letter, option in options.items() if _plain(option).startswith(f"{_plain(text)} ")]


@dataclass(kw_only=True)
class ChoiceConfig(RewardConfig):
    """1 for the right option, else 0. Options are read from ``problem.meta["choices"]`` (or ``["options"]``)."""

    strict: bool = True  # read the answer where it was asked for alone; false reads answer lines, too


@register("reward", "choice", ChoiceConfig)
def choice(groups: Sequence[Group], config: ChoiceConfig, context: Context) -> Scores:
    """Grade every completion with :func:`verify_choice`."""
    scores, verdicts = [], []
    for group in groups:
        problem = group.prompt.problem
        options = options_of(problem.meta)
        prefix = OPEN_THINK if opens_thinking(group.prompt, context.tokenizer) else ""
        row = [
            verify_choice(prefix + each.text, problem.answer, options, strict=config.strict)
            for each in group.completions
        ]
        verdicts += row
        scores.append([verdict.score for verdict in row])
    extracted = Mean.of([float(verdict.extracted is not None) for verdict in verdicts])
    return Scores(scores=scores, metrics={"choice/extracted": extracted})
