r"""Words or algebra: ``the red one`` is a text, ``ab - ac`` is a difference of products."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SHORT = set(
    "yes no true false odd even none dne the and not red one two ten six all any max min for his her day sun mon tue "
    "wed thu fri sat ja nein of to in is on up or tie win left it we he she ann sam tom tim bob joe may jan feb mar "
    "apr jun jul aug sep oct nov dec cm mm km dm ft yd kg mg lb oz ml hr".split()
)
_MATH_WORDS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "inf", "infinity", "arcsin", "arccos",
               "arctan", "sinh", "cosh", "tanh", "pi"}  # fmt: skip
_VOWEL = re.compile("[aeiouyäöüéè]", re.IGNORECASE)
_FACTORS = set("abcdef"), set("uvwxyz"), set("ijklmn"), set("pqrst")
_TEXT_COMMAND = re.compile(r"\\text\s*\{([^{}]*)\}")
_LETTERS = r"a-zA-ZÀ-ɏ\u0370-\u03ff\u0400-\u04ff\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af"
_WORDS = re.compile(rf"[{_LETTERS}\s'\-,.()!?\"]+")
_NUMBERED_WORDS = re.compile(rf"[{_LETTERS}]{{3,}}[{_LETTERS}0-9\s,.'\-]*")
_HAN_SPACE = re.compile(r"(?<=[\u4e00-\u9fff]) | (?=[\u4e00-\u9fff])")
_ARTICLES = re.compile(r"\b(?:the|a|an)\s+")
_SEPARATOR = re.compile(r"\s*(?:,\s*(?:and|or)\b|,|;|\band\b|\bor\b)\s*")
_SAME_TEXT = {"dne": "does not exist", "empty set": r"\emptyset", "all reals": r"\mathbb{r}", "空集": r"\emptyset",
              "all real numbers": r"\mathbb{r}", "real numbers": r"\mathbb{r}", "any real number": r"\mathbb{r}",
              "set of all real numbers": r"\mathbb{r}", "all real": r"\mathbb{r}", "所有实数": r"\mathbb{r}",
              "全体实数": r"\mathbb{r}", "set of real numbers": r"\mathbb{r}", "every real number": r"\mathbb{r}",
              "all real numbers x": r"\mathbb{r}", "x is any real number": r"\mathbb{r}",
              "no solutions": "no solution", "there is no solution": "no solution"}  # fmt: skip


@dataclass(frozen=True)
class Text:
    r"""Words, case-folded, without articles and punctuation; ``listed`` the items where they are a list of short texts.

    ``raw`` is the text before folding, if it had no ``\text`` and so may be algebra after all.
    """

    words: str
    raw: str = ""
    listed: tuple[str, ...] = ()


def is_word(token: str) -> bool:
    """Letters that spell a word and not a product of variables."""
    if not token.isascii() or token.lower() in _SHORT:
        return True
    if token.isupper() and (len(token) < 5 or list(token) == sorted(token)):
        return False
    if len(token) < 3 or not _VOWEL.search(token) or any(set(token) <= letters for letters in _FACTORS):
        return False
    return len(token) >= 4 or bool(re.search("[eiou]", token[1:]))


def is_common(text: str) -> bool:
    """Does one of the short common words stand in it, which no product of variables spells by chance?"""
    return any(token.lower() in _SHORT for token in re.findall(r"[^\W\d_]+", text))


def has_han(text: str) -> bool:
    """Is a Chinese character in it?"""
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def fold(plain: str) -> str:
    """Case, articles and punctuation out; hyphens stay."""
    folded = " ".join("".join(c if c.isalnum() or c == "-" else " " for c in plain.casefold()).split())
    folded = _ARTICLES.sub("", folded + " ").strip() or folded
    folded = folded if folded.isascii() else _HAN_SPACE.sub("", folded)
    return _SAME_TEXT.get(folded, folded)


def parse_text(text: str) -> Text | None:
    r"""Words, in ``\text{}`` or bare; letters that could be a product of variables are not words."""
    wrapped = _TEXT_COMMAND.search(text) is not None
    plain = _TEXT_COMMAND.sub(r" \1 ", text).replace(r"\,", " ").replace("\\ ", " ").strip()
    if not _WORDS.fullmatch(plain) and not _NUMBERED_WORDS.fullmatch(plain):
        return None
    tokens = re.findall(r"[^\W\d_]+", plain)
    if not tokens or not (wrapped or any(map(is_word, tokens))):
        return None
    if not wrapped and (any(token.lower() in _MATH_WORDS for token in tokens) or tokens[0] in ("or", "and")):
        return None
    if not wrapped and all((len(token) == 1 and token.isascii()) or token in ("and", "or") for token in tokens):
        return None
    return Text(fold(plain), "" if wrapped else text, _listed(plain))


def _listed(plain: str) -> tuple[str, ...]:
    """The items of ``A, D`` or ``red and blue``; empty where the text is a sentence."""
    pieces = [piece for piece in _SEPARATOR.split(plain.strip(" .()")) if piece]
    short = len(pieces) > 1 and all(len(piece.split()) <= 2 for piece in pieces)
    return tuple(fold(piece) for piece in pieces) if short else ()
