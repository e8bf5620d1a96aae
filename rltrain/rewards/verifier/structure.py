r"""What kind of answer a string is: list, set, tuple, interval, union, matrix, equation, clock time, text, quantity.

``parse_structure`` splits at the top level only and leaves the expressions inside to ``math_expression``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rltrain.rewards.verifier.text import strip_wrappers
from rltrain.rewards.verifier.unit import Quantity, parse_quantity

MAX_LEVELS = 16

_SCAN = re.compile(r"\\begin\s*\{[a-z]+\*?\}|\\end\s*\{[a-z]+\*?\}|(?<!\\)\\[{}]|\\langle|\\rangle|[()\[\]{}]")
_CLOSERS = (")", "]", "}", r"\}", r"\rangle")
_WORD_JOINER = re.compile(
    r"\\text\s*\{\s*,?\s*(?:or|and)\s*\}|(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])|\\(?:lor|vee|land|wedge)(?![a-z])|;"
)
_ANY_COMMA = re.compile(r"(?<!\\),")
_LIST_COMMA = re.compile(r"(?<!\\),(?!\d{3}(?!\d))|(?<![\d\\]),")
_CUP = re.compile(r"\\cup(?![a-zA-Z])|(?<=[)\]}])\s*[Uu]\s*(?=[(\[\\])")
_ORDER = re.compile(r"\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|\\ne(?![a-zA-Z])|[<>]")
_EQUALS = re.compile(r"=|\\in(?![a-zA-Z])|\\approx(?![a-zA-Z])|\\equiv(?![a-zA-Z])")
_ROW, _CELL = re.compile(r"\\\\(?:\[[^\]]*\])?|\\cr(?![a-zA-Z])"), re.compile(r"&")
_MATRIX = re.compile(
    r"\\begin\s*\{(?P<kind>[pbvBV]?matrix|smallmatrix|array)\}(?:\s*\{[^{}]*\})?(?P<body>.*)\\end\s*\{(?P=kind)\}",
    re.DOTALL,
)
_PAIR = re.compile(r"(\d{1,9}(?:\s*:\s*\d{1,9})+)\s*(?:\\text\s*\{)?\s*((?:[ap]\.?\s?m\.?)?)\s*\}?", re.IGNORECASE)
_TEXT_COMMAND = re.compile(r"\\text\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[a-zA-ZÀ-ɏ\s'\-,.()!?\"]+")
_NUMBERED_WORDS = re.compile(r"[a-zA-Z]{3,}[a-zA-Z0-9\s,.'\-]*")
_MATH_WORDS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "inf", "infinity"}
_ARTICLES = re.compile(r"\b(?:the|a|an)\s+")
_SAME_TEXT = {"dne": "does not exist", "empty set": r"\emptyset", "all reals": r"\mathbb{r}",
              "all real numbers": r"\mathbb{r}"}  # fmt: skip
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![a-zA-Z])")
_REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?|\\text\s*\{\s*R\s*\}|\\Reals?(?![a-z])")


@dataclass(frozen=True)
class Text:
    """Words, case-folded, without articles and punctuation."""

    words: str


@dataclass(frozen=True)
class Items:
    """A set (``brackets="{}"``), a bare list (``""``), or an ordered tuple, vector or interval with its brackets."""

    brackets: str
    items: tuple[Structure, ...]

    @property
    def ordered(self) -> bool:
        return self.brackets not in ("", "{}")


@dataclass(frozen=True)
class Union:
    """Parts joined by ``\\cup``."""

    parts: tuple[Structure, ...]


@dataclass(frozen=True)
class Matrix:
    """Rows of entries; ``determinant`` where the delimiters are bars."""

    rows: tuple[tuple[Structure, ...], ...]
    determinant: bool


@dataclass(frozen=True)
class Equation:
    """``a = b = c`` as its sides, still text."""

    sides: tuple[str, ...]


@dataclass(frozen=True)
class Relation:
    """An inequality chain in ascending order: ``operators[i]`` stands between sides i and i + 1."""

    sides: tuple[str, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """A clock time or a ratio: the numbers between colons."""

    numbers: tuple[int, ...]
    half: str


Structure = Text | Items | Union | Matrix | Equation | Relation | Pair | Quantity


def split_top(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split at the separators that stand outside every bracket, group and environment."""
    depth_at: list[tuple[int, int]] = [(0, 0)]
    depth = 0
    for token in _SCAN.finditer(text):
        closes = token[0] in _CLOSERS or token[0].startswith(r"\end")
        depth += -1 if closes else 1
        depth_at.append((token.start() if not closes else token.end(), depth))
    pieces, start, cursor = [], 0, 0
    for found in separator.finditer(text):
        while cursor + 1 < len(depth_at) and depth_at[cursor + 1][0] <= found.start():
            cursor += 1
        if depth_at[cursor][1] == 0:
            pieces.append(text[start : found.start()])
            start = found.end()
    return [*pieces, text[start:]]


def enclosed(text: str) -> tuple[str, str, str] | None:
    """``(opening, inside, closing)`` if one pair of brackets spans the whole text; the two may differ: ``[0, 1)``."""
    tokens = list(_SCAN.finditer(text))
    if len(tokens) < 2 or tokens[0].start() != 0 or tokens[-1].end() != len(text) or tokens[0][0] in _CLOSERS:
        return None
    depth = 0
    for index, token in enumerate(tokens):
        depth += -1 if token[0] in _CLOSERS or token[0].startswith(r"\end") else 1
        if depth == 0 and index < len(tokens) - 1:
            return None
    if depth != 0:
        return None
    return tokens[0][0], text[tokens[0].end() : tokens[-1].start()], tokens[-1][0]


def parse_text(text: str) -> Text | None:
    r"""Words, in ``\text{}`` or bare; letters that could be a product of variables are not words."""
    wrapped = _TEXT_COMMAND.search(text) is not None
    plain = _TEXT_COMMAND.sub(r" \1 ", text).replace(r"\,", " ").replace("\\ ", " ").strip()
    if not _WORDS.fullmatch(plain) and not _NUMBERED_WORDS.fullmatch(plain):
        return None
    words = re.findall(r"[^\W\d_]+", plain)
    long = [word for word in words if len(word) > 1 and word.lower() not in ("or", "and")]
    if not words or (not wrapped and (not long or (len(plain) < 3 and plain.lower() not in ("no",)))):
        return None
    if not wrapped and any(word.lower() in _MATH_WORDS for word in words):
        return None
    folded = " ".join("".join(c if c.isalnum() or c == "-" else " " for c in plain.casefold()).split())
    folded = _ARTICLES.sub("", folded + " ").strip() or folded
    return Text(_SAME_TEXT.get(folded, folded))


def parse_structure(text: str, *, grouped: bool = True, level: int = 0) -> Structure:
    """The structure of a cleaned answer. ``grouped``: a comma before three digits groups thousands."""
    text = strip_wrappers(text)
    if level > MAX_LEVELS:
        return Quantity(text)
    words = parse_text(text)
    if words is not None:
        return words
    for read in (_split_list, _split_union, _split_order, _split_equals, _matrix, _bracketed, _pair, _plus_minus):
        structure = read(text, grouped, level)
        if structure is not None:
            return structure
    if _REALS.fullmatch(text):
        return Items("()", (Quantity(r"-\infty"), Quantity(r"\infty")))
    if text in (r"\emptyset", r"\{\}", r"\{ \}"):
        return Text(r"\emptyset")
    return parse_quantity(text)


def _split_list(text: str, grouped: bool, level: int) -> Structure | None:
    pieces = split_top(text, _WORD_JOINER)
    commas = _LIST_COMMA if grouped else _ANY_COMMA
    pieces = [piece for part in pieces for piece in split_top(part, commas)]
    pieces = [piece for piece in (piece.strip() for piece in pieces) if piece]
    if len(pieces) < 2:
        return None
    return Items("", tuple(parse_structure(piece, grouped=grouped, level=level + 1) for piece in pieces))


def _split_union(text: str, grouped: bool, level: int) -> Structure | None:
    parts = split_top(text, _CUP)
    if len(parts) < 2:
        return None
    return Union(tuple(parse_structure(part, grouped=grouped, level=level + 1) for part in parts))


def _split_order(text: str, grouped: bool, level: int) -> Structure | None:
    sides = split_top(text, _ORDER)
    operators = [operator.strip() for operator in _ORDER.findall(text)]
    if len(sides) < 2 or len(operators) != len(sides) - 1:
        return None
    if all(operator in (">", r"\ge") for operator in operators):
        sides, operators = sides[::-1], [{">": "<", r"\ge": r"\le"}[operator] for operator in operators[::-1]]
    return Relation(tuple(side.strip() for side in sides), tuple(operators))


def _split_equals(text: str, grouped: bool, level: int) -> Structure | None:
    sides = [side.strip() for side in split_top(text, _EQUALS)]
    if len(sides) < 2:
        return None
    if not sides[0]:  # "= 5" and "\approx 5"
        return parse_structure(sides[1], grouped=grouped, level=level + 1) if len(sides) == 2 else None
    return Equation(tuple(sides))


def _matrix(text: str, grouped: bool, level: int) -> Structure | None:
    found = _MATRIX.fullmatch(text) or _MATRIX.fullmatch(text.strip("()[] "))
    if not found:
        return None
    rows = [row for row in split_top(found["body"], _ROW) if row.strip()]
    cells = [[parse_structure(cell, level=level + 1) for cell in split_top(row, _CELL)] for row in rows]
    return Matrix(tuple(tuple(row) for row in cells), determinant=found["kind"][0] in "vV")


def _bracketed(text: str, grouped: bool, level: int) -> Structure | None:
    found = enclosed(text)
    if found is None or found[0] not in ("(", "[", r"\{", r"\langle"):
        return None
    opening, inside, closing = found
    if opening == r"\{":
        if closing != r"\}" or re.search(r"\\mid|\||:", inside):
            return None
        opening, closing = "{", "}"
    if opening == r"\langle":
        opening, closing = "(", ")"
    if not inside.strip():
        return Text(r"\emptyset") if opening == "{" else None
    inner_grouped = ", " in inside
    commas = _LIST_COMMA if inner_grouped else _ANY_COMMA
    pieces = split_top(inside, commas)
    if len(pieces) == 1 and opening == "(" and closing == ")":
        return parse_structure(inside, grouped=grouped, level=level + 1)
    items = [parse_structure(piece, grouped=inner_grouped, level=level + 1) for piece in pieces]
    if opening == "{" and len(items) == 1 and isinstance(items[0], Items) and not items[0].ordered:
        return Items("{}", items[0].items)
    return Items(opening + closing, tuple(items))


def _pair(text: str, grouped: bool, level: int) -> Structure | None:
    found = _PAIR.fullmatch(text)
    if not found:
        return None
    half = re.sub(r"[.\s]", "", found[2]).lower()
    return Pair(tuple(int(number) for number in found[1].split(":")), half)


def _plus_minus(text: str, grouped: bool, level: int) -> Structure | None:
    if not _PLUS_MINUS.search(text):
        return None
    upper = _PLUS_MINUS.sub(lambda found: "+" if found[1] == "pm" else "-", text)
    lower = _PLUS_MINUS.sub(lambda found: "-" if found[1] == "pm" else "+", text)
    return Items("", tuple(parse_structure(part.strip().removeprefix("+"), level=level + 1) for part in (upper, lower)))
