r"""Where the answer is: the text after the last ``</think>``, then a box, a ``####`` line, or an ``Answer:`` line.

Every scan is linear and looks at the last 8 KB only, so a completion of any length or shape costs the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

TAIL_CHARACTERS = 8192
OPEN_THINK, CLOSE_THINK = "<think>", "</think>"

_BOX_COMMAND = re.compile(r"\\+(?:boxed|fbox)(?![a-zA-Z])")
_BOX_TOKEN = re.compile(r"(?P<command>\\+(?:boxed|fbox)(?![a-zA-Z]))\s*(?P<brace>\{)?|\\.|[{}]", re.DOTALL)
# What may follow a box without braces: a number, a command, a single letter; never a word of prose.
_BRACELESS = re.compile(r"(?=[-+]?[\d.\\]|[-+]?[a-zA-Z](?![a-zA-Z]))[^\s{}$]{1,64}(?:\{[^{}]*\}[^\s{}$]{0,64}){0,8}")
_JOINER_NOISE = re.compile(
    r"\\(?:text|q?quad|,|;|[()\[\]])"  # spacing
    r"|(?<![\w\\])\(?[a-zA-Z\d]{1,2}[.)](?=[\s$])"  # the mark of a list item: "2." or "(b)"
    r"|[$&{}()\[\]~*.|/\-\s]+"
)
_JOINER = re.compile(
    r"(?:(?:[,;]|and|or)(?: ?(?:and|or))?(?: (?:maybe|possibly|perhaps|also|even|else|alternatively|equivalently))?"
    r"(?: ?\\?[a-z]\w{0,7}(?: \d)? ?=)?|=)?",
    re.IGNORECASE,
)
_SPACES = re.compile(r"\s+")
_HASHES = re.compile(r"####\s*([^\n]+)")
# "Answer:" may have its answer on the next line, "the answer is" has it on its own.
_ANSWER_MARK = re.compile(
    r"(?:\b(?:answer|antwort)\b|答案)[ \t*_]*(?:(?:is|ist|是|为)\b[ \t]*[:：]?|[:：=]\s*)[ \t*_]*"
    r"(?:(?:the )?(?:final )?answer is|is)?[ \t:]*"
    r"|^[ \t#*_]*(?:final )?answer[ \t*_:]*\n\s*", re.IGNORECASE | re.MULTILINE
)  # fmt: skip
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*|__([^_\n]+)__")
_MINERVA_TAIL = re.compile(r"I hope (?:it|this) is correct.*$", re.IGNORECASE | re.DOTALL)
_NEXT_SENTENCE = re.compile(r"[.!?]\s+(?=[A-Z]).*$", re.DOTALL)
_OPEN_TAG, _CLOSE_TAG = "<answer>", "</answer>"
_LABEL = re.compile(r"(?P<name>\\?[a-zA-Z]+(?:_\{?\w\}?)?)\s*=\s*(?:\\[(\[]|\$)?\s*$")


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """The answers found (several only when boxes are joined), or none and the reason."""

    answers: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Box:
    """``content`` is None when the box never closes; ``start`` and ``end`` delimit it in the tail."""

    start: int
    end: int
    content: str | None


def after_thinking(completion: str) -> tuple[str | None, str]:
    """``(text after </think>, "")``, or ``(None, reason)`` when the tags forbid an answer."""
    closes = completion.count(CLOSE_THINK)
    if closes > 1:
        return None, f"{closes} closing think tags"
    if closes == 0:
        return (None, "thinking never closed") if OPEN_THINK in completion else (completion, "")
    answer = completion[completion.rindex(CLOSE_THINK) + len(CLOSE_THINK) :]
    return (None, "thinking opened again and never closed") if OPEN_THINK in answer else (answer, "")


def boxes(text: str) -> list[Box]:
    r"""The outermost ``\boxed{}`` and ``\fbox{}`` in order, from one pass with a stack of open braces."""
    closed: list[Box] = []
    open_braces: list[tuple[re.Match[str], bool]] = []
    start = text.find("box")
    while start > 0 and text[start - 1] in "\\f":
        start -= 1
    for token in _BOX_TOKEN.finditer(text, start) if start >= 0 else ():
        if token["command"] and not token["brace"]:
            content = _BRACELESS.match(text, token.end())
            if content:
                closed.append(_box(text, token, content.start(), content.end(), content.end()))
        elif token["command"] or token[0] == "{":
            open_braces.append((token, bool(token["command"])))
        elif token[0] == "}" and open_braces:
            opener, is_box = open_braces.pop()
            if is_box:
                while closed and closed[-1].start > opener.start():
                    closed.pop()
                closed.append(_box(text, opener, opener.end(), token.start(), token.end()))
    unclosed = [Box(start=token.start(), end=len(text), content=None) for token, is_box in open_braces if is_box]
    return sorted(closed + unclosed, key=lambda box: box.start)


def _box(text: str, opener: re.Match[str], start: int, stop: int, end: int) -> Box:
    content = _BOX_COMMAND.sub("", text[start:stop])
    if opener[0].startswith("\\\\"):  # JSON-escaped output: every backslash is doubled
        content = content.replace("\\\\", "\\")
    return Box(start=opener.start(), end=end, content=content)


def _joined(separator: str) -> bool:
    return len(separator) <= 80 and bool(_JOINER.fullmatch(_SPACES.sub(" ", _JOINER_NOISE.sub(" ", separator)).strip()))


def _joined_run(text: str, found: Sequence[Box]) -> list[Box]:
    """The last box and those before it that are joined to it."""
    run = [found[-1]]
    for box in reversed(found[:-1]):
        if box.content is None or not _joined(text[box.end : run[0].start]):
            break
        run.insert(0, box)
    return run


def boxed(text: str) -> Extracted:
    """The last box; with the boxes joined to it by punctuation, "and" or "or", as the items of one answer."""
    found = boxes(text)
    if not found:
        return Extracted(reason="no box")
    if any(box.content is None and box.end > found[-1].start for box in found):
        return Extracted(reason="box never closed")
    contents = tuple(box.content.strip() for box in _joined_run(text, found) if box.content is not None)
    return Extracted(answers=contents[:1] if len(set(contents)) == 1 else contents)


def _unwrapped(line: str) -> tuple[str, ...]:
    """A line after a mark: its box if it has one, else the line without a closing tag and emphasis."""
    boxed_answers = boxed(line).answers if boxes(line) else ()
    plain = line.split(_CLOSE_TAG)[0].strip().strip("*_ \t")
    return boxed_answers or ((plain,) if plain else ())


def hashes(text: str) -> Extracted:
    """GSM8K: what follows the last ``####``, or the box there."""
    found = _HASHES.findall(text)
    return Extracted(answers=_unwrapped(found[-1])) if found else Extracted(reason="no #### line")


def _marked_line(text: str) -> Extracted:
    text = _MINERVA_TAIL.sub("", text)
    marks = list(_ANSWER_MARK.finditer(text))
    line = text[marks[-1].end() :].split("\n", 1)[0] if marks else ""
    if not line.strip():
        return Extracted(reason="no Answer: line")
    return Extracted(answers=_unwrapped(line if boxes(line) else _NEXT_SENTENCE.sub("", line)))


def answer_line(text: str) -> Extracted:
    """Minerva: what follows the last ``Answer:`` or "the answer is", or the box there; without either, the last box."""
    found = _marked_line(text)
    return found if found.answers or not boxes(text) else boxed(text)


def tagged(text: str) -> Extracted:
    """The last ``<answer>…</answer>``."""
    start = text.rfind(_OPEN_TAG)
    if start < 0 or _CLOSE_TAG not in text[start:]:
        return Extracted(reason="no answer tag")
    return Extracted(answers=_unwrapped(text[start + len(_OPEN_TAG) :].split(_CLOSE_TAG)[0]))


def lenient(text: str) -> Extracted:
    """A box; else an answer tag; else the last ``####`` or ``Answer:`` line; else the last bold span."""
    if boxes(text):
        return boxed(text)
    for find in (tagged, hashes, _marked_line):
        found = find(text)
        if found.answers:
            return found
    bold = _BOLD.findall(text)
    return Extracted(answers=("".join(bold[-1]).strip(),)) if bold else Extracted(reason="no box, answer line or bold")


EXTRACTORS = {"boxed": boxed, "gsm8k": hashes, "minerva": answer_line, "lenient": lenient}


def extract(completion: str, method: str) -> Extracted:
    """The answers that ``method`` (a key of ``EXTRACTORS``) finds in the last 8 KB after the thinking."""
    text, reason = after_thinking(completion)
    if text is None:
        return Extracted(reason=reason)
    found = EXTRACTORS[method](text[-TAIL_CHARACTERS:])
    answers = tuple(answer for answer in found.answers if answer)
    return Extracted(answers=answers, reason="" if answers else found.reason or "empty answer")


def gold_of(gold: str) -> str:
    """The gold itself; of a worked solution, its ``####`` line, or its last box with the boxes joined to it."""
    if "####" in gold:
        return ", ".join(hashes(gold).answers)
    found = boxes(gold)
    if not found:
        return gold.strip()
    run = _joined_run(gold, found)
    names = [_LABEL.search(gold[max(0, box.start - 40) : box.start]) for box in run]
    contents = [(box.content or "").strip() for box in run]
    if len({match["name"] for match in names if match}) == len(run) > 1:
        contents = [f"{match['name']} = {content}" for match, content in zip(names, contents, strict=True) if match]
    return ", ".join(contents)
