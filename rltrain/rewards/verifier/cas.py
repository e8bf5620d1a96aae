r"""The last rung: math-verify on two short, gated strings, in a killable child process.

Only what ``compare`` cannot tell comes here, and only if math-verify reads all of its notation. It drops primes,
conditions, pieces of a piecewise function and minutes of arc without a word; such texts never reach it.
"""

from __future__ import annotations

import itertools
import re
import time
from functools import lru_cache
from typing import Any

from rltrain.rewards.sandbox.pool import ChildReply, Pool, shared_pool

# A verdict may take VERDICT_S of the CAS in all, the start of a child and the reading of the gold included.
VERDICT_S, ITEM_DEADLINE_S, ITEM_CPU_S = 0.9, 0.8, 0.7
_TARGET = "rltrain.rewards.verifier.cas:equivalent"
_WORDS = re.compile(r"\\text|(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_KNOWN_WORDS = re.compile(r"(?<![\\a-zA-Z])(?:sqrt|sin|cos|tan|log|ln|exp|pi|d[xyztu])(?![a-zA-Z])")
_BOMBS = re.compile(
    r"\d{31}|\^\s*\{?\s*[-+(]?\s*\d{4}|\d{3}\s*\)?\s*!|!\s*\)?\s*!|\^[^-+*/=,]{0,16}\^|\\(?:pow|uparrow|Gamma)|_\s*_"
)
_ITERATED = re.compile(r"\\(?:sum|prod|i*int|oint|lim|bigcup|bigcap)(?![a-zA-Z])")
_ALLOWED = re.compile(r"[\x20-\x7e]{1,200}")
_COMMAND = re.compile(r"\\([a-zA-Z]+|.)")
# Commands that math-verify reads in full.
_READ = set(
    "frac sqrt binom sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp pi infty cdot times div "
    "cup setminus backslash mathbb emptyset left right lfloor rfloor lceil rceil begin end sum prod int lim to le ge "
    "ne in alpha beta gamma delta epsilon theta lambda mu sigma phi omega rho tau , { } \\".split()
) | {" "}
_HALF_READ = re.compile(
    r"['\"`]|\\\{[^{}]*[|:]|\\begin\s*\{(?!p?matrix|bmatrix|vmatrix)|\\mathbb\s*\{?\s*[^R{\s]|[;:?@#~&]"
)
NO_ALARM: Any = None  # math-verify's own time-out needs the main thread; ours needs nothing of it
MAX_COMMANDS, MAX_NESTING = 40, 8


def gate(gold: str, answer: str) -> str:
    """Why the pair must not reach the CAS; empty if it may."""
    for name, text in (("gold", gold), ("answer", answer)):
        if not _ALLOWED.fullmatch(text):
            return f"{name}: characters or length"
        if _WORDS.search(_KNOWN_WORDS.sub("", re.sub(r"\\[a-z]*matrix|\\(?:begin|end)\s*\{[a-z]*\}", "", text))):
            return f"{name}: words"
        if text.count("\\") > MAX_COMMANDS or _nesting(text) > MAX_NESTING:
            return f"{name}: too complex"
        if _BOMBS.search(text):
            return f"{name}: numbers too large"
        if _HALF_READ.search(re.sub(r"(?<=[^\\])&(?=.*\\end)", "", text)) or not set(_COMMAND.findall(text)) <= _READ:
            return f"{name}: notation that the CAS does not read in full"
    if answer != gold and _ITERATED.search(answer):
        return "answer: leaves a sum, product, integral or limit to do"
    return ""


def _nesting(text: str) -> int:
    depths = itertools.accumulate((c in "{([") - (c in "})]") for c in text)
    return max(depths, default=0)


def equivalent(gold: str, answer: str) -> bool | None:
    """In the child: does math-verify find the two equal? None if it cannot parse the gold."""
    import math_verify

    config = [math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()]
    expected, found = (
        math_verify.parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=NO_ALARM)
        for text in (gold, answer)
    )
    if not expected:
        return None
    return bool(found) and bool(math_verify.verify(expected, found, timeout_seconds=NO_ALARM))


def prepare() -> None:
    """In the child, before it takes items: the imports and the tables of the parsers."""
    equivalent(r"(-\infty,\frac{1}{2})\cup(3,\infty)", r"\sqrt{x}+\sin 2")


def _pool() -> Pool:
    return shared_pool(
        _TARGET,
        lambda: Pool(_TARGET, deadline_s=ITEM_DEADLINE_S, item_cpu_s=ITEM_CPU_S, prepare="prepare"),
    )


def warm(wait_s: float = 0.0) -> bool:
    """Start the child in the background, because its imports take longer than most verdicts; wait until it is ready."""
    pool = _pool()
    pool.warm()
    return wait_s > 0 and pool.is_ready(wait_s)


@lru_cache(maxsize=65536)
def _known(gold: str, answer: str) -> list[ChildReply]:
    """A cell that remembers a final reply; an empty one is filled by ``ask``."""
    return []


def ask(gold: str, answer: str, *, end: float) -> ChildReply:
    """The child's verdict before the time ``end``, remembered unless the machine and not the item was at fault."""
    cell = _known(gold, answer)
    if cell:
        return cell[0]
    reply = _pool().call(gold, answer, total_s=end - time.monotonic())
    if reply.status in ("ok", "error", "memory", "cpu"):
        cell.append(reply)
    return reply


def reads(gold: str, *, end: float) -> bool | None:
    """Can the CAS read the gold, that is, find it equal to itself? None where the machine did not answer."""
    if "\\" not in gold or gate(gold, gold):
        return False
    reply = ask(gold, gold, end=end)
    if reply.status in ("timeout", "skipped", "died"):
        return None
    return reply.status == "ok" and reply.value is True
