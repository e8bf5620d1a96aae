r"""What kind of answer a string is: list, set, tuple, interval, union, matrix, equation, clock time, text, quantity.

``parse_structure`` splits at the top level only and leaves the expressions inside to ``expression``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from rltrain.rewards.verifier.evaluate import real_value
from rltrain.rewards.verifier.text import strip_wrappers
from rltrain.rewards.verifier.unit import Quantity, parse_quantity
from rltrain.rewards.verifier.words import Text, fold, has_han, parse_text

MAX_LEVELS = 16

_SCAN = re.compile(r"\\begin\s*\{[a-z]+\*?\}|\\end\s*\{[a-z]+\*?\}|(?<!\\)\\[{}]|\\langle|\\rangle|[()\[\]{}]")
_CLOSERS = (")", "]", "}", r"\}", r"\rangle")
_WORD_JOINER = re.compile(
    r"\\text\s*\{\s*,?\s*(?:or|and|oder|und|或|和)\s*,?\s*\}|(?<![a-zA-Z\\])(?:or|and|oder|und)(?![a-zA-Z])|或|和"
    r"|\\(?:lor|vee|land|wedge)(?![a-z])"
)
_SEMICOLON = re.compile(r"(?<!\\);")
_ANY_COMMA = re.compile(r"(?<!\\),")
_GROUPED = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)")
_CUP = re.compile(r"\\(?:big)?cup(?![a-zA-Z])|(?<=[)\]}\[])\s*[Uu]\s*(?=[(\[\]\\])")
_ORDER = re.compile(r"\\le(?![a-zA-Z])|\\ge(?![a-zA-Z])|\\ne(?![a-zA-Z])|[<>]")
_EQUALS = re.compile(r"=|\\in(?![a-zA-Z])|\\(?:approx|simeq|doteq)(?![a-zA-Z])|\\equiv(?![a-zA-Z])|\\to(?![a-zA-Z])")
_APPROX = re.compile(r"\\(?:approx|simeq|doteq)")
_ROW, _CELL = re.compile(r"\\\\(?:\[[^\]]*\])?|\\cr(?![a-zA-Z])"), re.compile(r"&")
_MATRIX = re.compile(
    r"\\begin\s*\{(?P<kind>[pbvBV]?matrix|smallmatrix|array|aligned|gathered)\}(?:\s*\{[^{}]*\})?(?P<body>.*)\\end\s*\{(?P=kind)\}",
    re.DOTALL,
)
_CASES = re.compile(
    r"(?:\\\{\s*)?\\begin\s*\{(?P<kind>[dr]?cases|array|aligned|matrix)\}(?:\s*\{[^{}]*\})?(?P<body>.*)\\end\s*\{(?P=kind)\}",
    re.DOTALL,
)
_CONDITION_WORD = re.compile(
    r"\\text\s*\{\s*,?\s*(?:if|when|for|falls|wenn|für|当)?\s*,?\s*\}|(?<![a-zA-Z\\])(?:if|when|for)(?![a-zA-Z])"
)
_FRENCH = re.compile(r"(?P<opening>[(\[\]])(?P<inside>[^()\[\]]*,[^()\[\]]*)(?P<closing>[)\[\]])")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![a-zA-Z])")
_WRAPPED = re.compile(r"\\text\s*\{([^{}]*\d[^{}]*)\}")
_REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?|\\text\s*\{\s*R\s*\}|\\Reals?(?![a-z])")
_WITHOUT = re.compile(
    r"(?:\\mathbb\s*\{?\s*R\s*\}?|\\text\s*\{\s*R\s*\}|\(\s*-\s*\\infty\s*,\s*\+?\\infty\s*\))\s*"
    r"(?:\\setminus|\\backslash|-|\\)\s*\\\{(?P<points>[^{}|]*(?:\{[^{}|]*\}[^{}|]*)*)\\\}"
)
_WHOLE_LETTER = re.compile(
    r"[,;(\s]*(?:\\text\s*\{\s*,?\s*(?:where|for|with|and)?\s*\}\s*)?(?<![a-zA-Z])(?P<letter>[a-z])\s*"
    r"(?:\\in\s*\\mathbb\{Z\}|\\text\s*\{\s*(?:is )?(?:an |any )?integers?\s*\})\s*\)?$"
)
_IN_REALS = re.compile(r"\\in\s*(?:\\mathbb\s*\{?\s*R\s*\}?|R(?![a-z]))")
_LETTERED = re.compile(r"\\text\s*\{\s*\(([A-H])\)\s*\}(?:\\[ ,;:]|\s|~)*(?P<value>[^\s].*)", re.DOTALL)
_PART = re.compile(r"\d[\d.,]*\s*\\text\s*\{[^{}\d]*\}")
_MIXED = re.compile(rf"(?:{_PART.pattern}(?:\s|\\,|\\ )*){{2,4}}")
_SUCH_THAT = re.compile(r"\\mid(?![a-zA-Z])|\||(?<!\\):")
_HALF = re.compile(
    r"(?P<numbers>\d{1,2}(?:\s*:\s*\d{2}){0,2})(?:\s|\\,|\\ )*(?:\\text\s*\{\s*)?\s*"
    r"(?P<half>[ap]\.?\s?m\.?|noon|midnight|uhr|o'?\s?clock)?\s*\}?", re.IGNORECASE
)  # fmt: skip
_RATIO = re.compile(r"(?<!\\):|\\text\s*\{\s*to\s*\}|(?<=\d)\s+to\s+(?=\d)")


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
class Cases:
    """A piecewise value: (value, condition) of each piece; ``None`` for "otherwise"."""

    pieces: tuple[tuple[Structure, Structure | None], ...]


@dataclass(frozen=True)
class Condition:
    r"""``\{variable | condition\}``."""

    variable: str
    condition: Structure


@dataclass(frozen=True)
class Lettered:
    r"""An option with its letter: ``\textbf{(D) } 24``."""

    letter: str
    value: Structure


@dataclass(frozen=True)
class Equation:
    """``a = b = c`` as its sides, still text; ``rounded[k]`` says that the sign before side k was ``\\approx``."""

    sides: tuple[str, ...]
    rounded: tuple[bool, ...]


@dataclass(frozen=True)
class Relation:
    """An inequality chain in ascending order: ``operators[i]`` stands between sides i and i + 1."""

    sides: tuple[str, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Clock:
    """A clock time: hours, minutes, seconds as written, and ``am``, ``pm`` or empty."""

    numbers: tuple[int, int, int]
    half: str


@dataclass(frozen=True)
class Ratio:
    """The terms between colons, still text."""

    terms: tuple[str, ...]


Structure = (
    Text | Items | Union | Matrix | Cases | Condition | Lettered | Equation | Relation | Clock | Ratio | Quantity
)
EVERYTHING = Items("()", (Quantity(r"-\infty"), Quantity(r"\infty")))


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


def split_commas(text: str, grouped: bool) -> list[str]:
    """Split at top-level commas; ``grouped``: not at those that group thousands, as in ``1,000``."""
    if not grouped:
        return split_top(text, _ANY_COMMA)
    masked = _GROUPED.sub(lambda number: number[0].replace(",", "\0"), text)
    return [piece.replace("\0", ",") for piece in split_top(masked, _ANY_COMMA)]


def has_grouped(text: str) -> bool:
    """Does a comma stand in it that may group thousands or separate items?"""
    return bool(_GROUPED.search(text))


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


def parse_structure(text: str, *, grouped: bool = True, level: int = 0) -> Structure:
    """The structure of a cleaned answer. ``grouped``: a comma before three digits groups thousands."""
    text = _family(strip_wrappers(text))
    if level > MAX_LEVELS:
        return Quantity(text, raw=text)
    clock = _clock(text)
    if clock is not None:
        return clock
    words = parse_text(text)
    if words is not None:
        return _of_words(words)
    wrapped = _WRAPPED.fullmatch(text)
    if wrapped:
        return parse_structure(wrapped[1], grouped=grouped, level=level + 1)
    lettered = _LETTERED.fullmatch(text)
    if lettered:
        return Lettered(lettered[1], parse_structure(lettered["value"], grouped=grouped, level=level + 1))
    for read in _READERS:
        structure = read(text, grouped, level)
        if structure is not None:
            return structure
    if _REALS.fullmatch(text):
        return EVERYTHING
    if text in (r"\emptyset", r"\{\}", r"\{ \}"):
        return Text(r"\emptyset")
    quantity = parse_quantity(text)
    return Text(fold(text)) if has_han(quantity.text) else quantity


def _family(text: str) -> str:
    r"""``n\pi, n \in \mathbb{Z}`` as ``k\pi``: every whole number stands for the letter, whatever it is called."""
    found = _WHOLE_LETTER.search(text) if "mathbb" in text or "integer" in text else None
    shown = text[: found.start()].rstrip(" ,;(") if found else ""
    if not found or not re.search(rf"(?<![a-zA-Z]){found['letter']}", shown):
        return text
    return shown if re.search(r"(?<![\\a-zA-Z])k", shown) else _letter(found["letter"]).sub("k", shown)


def _letter(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\\a-zA-Z]){name}(?![a-zA-Z])")


def _of_words(words: Text) -> Structure:
    """A list of short texts as a list; "all real numbers" as an interval; other words as they are."""
    if words.words == r"\mathbb{r}":
        return EVERYTHING
    if len(words.listed) > 1:
        return Items("", tuple(Text(item) for item in words.listed))
    return words


def _mixed(text: str, grouped: bool, level: int) -> Structure | None:
    r"""``5 \text{ hours } 30 \text{ minutes}`` as a list of its quantities."""
    if not _MIXED.fullmatch(text):
        return None
    parts = [re.sub(r"\s*(?:,|and|und)\s*\}", "}", part[0]) for part in _PART.finditer(text)]
    return Items("", tuple(map(parse_quantity, parts)))


def _split_list(text: str, grouped: bool, level: int) -> Structure | None:
    halves = _filled(split_top(text, _SEMICOLON))
    groups = _filled(piece for half in halves for piece in split_top(half, _WORD_JOINER))
    rows = [_filled(split_commas(group, grouped)) for group in groups]
    if sum(map(len, rows)) < 2:
        return None

    def parse(piece: str) -> Structure:
        return parse_structure(piece, grouped=grouped, level=level + 1)

    marked = len(halves) > 1 or all("=" in piece for row in rows for piece in row)
    if len(rows) > 1 and marked and all(len(row) == len(rows[0]) > 1 for row in rows):  # p=5, q=2; p=7, q=2
        return Items("", tuple(Items("()", tuple(map(parse, row))) for row in rows))
    items = [parse(piece) for row in rows for piece in row]
    return Items("", tuple(part for item in items for part in _two_signs(item)))


def _filled(pieces: Iterable[str]) -> list[str]:
    return [stripped for piece in pieces if (stripped := piece.strip())]


def _two_signs(item: Structure) -> tuple[Structure, ...]:
    r"""The two values of ``\pm x`` inside a list."""
    return item.items if isinstance(item, Items) and not item.brackets else (item,)


def _split_union(text: str, grouped: bool, level: int) -> Structure | None:
    parts = split_top(text, _CUP)
    if len(parts) < 2:
        return None
    return Union(tuple(parse_structure(part, grouped=grouped, level=level + 1) for part in parts))


def _split_order(text: str, grouped: bool, level: int) -> Structure | None:
    sides = split_top(text, _ORDER)
    operators = [operator.strip() for operator in _ORDER.findall(text)]
    if len(sides) < 2 or len(operators) != len(sides) - 1 or _PLUS_MINUS.search(text):
        return None
    if all(operator in (">", r"\ge") for operator in operators):
        sides, operators = sides[::-1], [{">": "<", r"\ge": r"\le"}[operator] for operator in operators[::-1]]
    return Relation(tuple(side.strip() for side in sides), tuple(operators))


def _split_equals(text: str, grouped: bool, level: int) -> Structure | None:
    sides = [side.strip() for side in split_top(text, _EQUALS)]
    if len(sides) < 2:
        return None
    signs = _EQUALS.findall(text)
    rounded = tuple(bool(_APPROX.fullmatch(sign)) for sign in signs) if len(signs) == len(sides) - 1 else ()
    if not sides[0]:  # "= 5" and "\approx 5"
        return parse_structure(sides[1], grouped=grouped, level=level + 1) if len(sides) == 2 else None
    return Equation(tuple(sides), (False, *rounded) if rounded else (False,) * len(sides))


def _without_points(text: str, grouped: bool, level: int) -> Structure | None:
    r"""``\mathbb{R} \setminus \{1, 2\}`` as the union of the intervals between the points."""
    found = _WITHOUT.fullmatch(text)
    if not found:
        return None
    points = [point.strip() for point in split_top(found["points"], _ANY_COMMA)]
    values = [real_value(point) for point in points]
    if len(points) > MAX_LEVELS or None in values:
        return None
    ends = [r"-\infty", *(point for _, point in sorted(zip(values, points, strict=True))), r"\infty"]
    return Union(tuple(Items("()", (Quantity(a), Quantity(b))) for a, b in pairwise(ends)))


def _matrix(text: str, grouped: bool, level: int) -> Structure | None:
    found = _MATRIX.fullmatch(text) or _MATRIX.fullmatch(text.strip("()[] "))
    if not found:
        return None
    rows = [row for row in split_top(found["body"], _ROW) if row.strip()]
    texts = [split_top(row, _CELL) for row in rows]
    if found["kind"] in ("aligned", "gathered") or (found["kind"] == "array" and len(texts) == len(texts[0]) == 1):
        return parse_structure(", ".join("".join(row) for row in texts), level=level + 1)
    cells = [[parse_structure(cell, level=level + 1) for cell in row] for row in texts]
    return Matrix(tuple(tuple(row) for row in cells), determinant=found["kind"][0] in "vV")


def _cases(text: str, grouped: bool, level: int) -> Structure | None:
    found = _CASES.fullmatch(text)
    if not found or not (found["kind"].endswith("cases") or text.startswith(r"\{")):
        return None
    rows = [split_top(row, _CELL) for row in split_top(found["body"], _ROW) if row.strip()]
    if all(len(row) == 1 for row in rows) and not any(_CONDITION_WORD.search(row[0]) for row in rows):
        return parse_structure(", ".join(row[0] for row in rows), level=level + 1)  # a system, not a piecewise value
    pieces = []
    for row in rows:
        value, _, rest = ("&".join(row[:2]) if len(row) > 1 else _split_condition(row[0])).partition("&")
        condition = strip_wrappers(_CONDITION_WORD.sub("", rest))
        otherwise = re.search(r"otherwise|else|sonst|其他", condition)
        pieces.append(
            (
                parse_structure(value.strip().rstrip(","), level=level + 1),
                None if otherwise or not condition else parse_structure(condition, level=level + 1),
            )
        )
    return Cases(tuple(pieces))


def _split_condition(row: str) -> str:
    found = _CONDITION_WORD.search(row)
    return f"{row[: found.start()]}&{row[found.end() :]}" if found else row


def _french(text: str, grouped: bool, level: int) -> Structure | None:
    """``]0, 1[`` as ``(0, 1)``."""
    found = _FRENCH.fullmatch(text)
    if not found or not (found["opening"] == "]" or found["closing"] == "["):
        return None
    opening = "(" if found["opening"] == "]" else found["opening"]
    closing = ")" if found["closing"] == "[" else found["closing"]
    return parse_structure(f"{opening}{found['inside']}{closing}", grouped=grouped, level=level + 1)


def _bracketed(text: str, grouped: bool, level: int) -> Structure | None:
    found = enclosed(text)
    if found is None or found[0] not in ("(", "[", r"\{", r"\langle"):
        return None
    opening, inside, closing = found
    if opening == r"\{":
        if closing != r"\}":
            return None
        such_that = _such_that(inside, level)
        if such_that is not None:
            return such_that
        opening, closing = "{", "}"
    if opening == r"\langle":
        opening, closing = "(", ")"
    if not inside.strip():
        return Text(r"\emptyset") if opening == "{" else None
    inner_grouped = ", " in inside
    pieces = split_commas(inside, inner_grouped)
    if len(pieces) == 1 and opening == "(" and closing == ")":
        return parse_structure(inside, grouped=grouped, level=level + 1)
    if opening == "{" and (_SEMICOLON.search(inside) or _WORD_JOINER.search(inside)):
        whole = _split_list(inside, inner_grouped, level + 1)
        return Items("{}", whole.items) if isinstance(whole, Items) else None
    items = [parse_structure(piece, grouped=inner_grouped, level=level + 1) for piece in pieces]
    if opening == "{":
        return Items("{}", tuple(part for item in items for part in _two_signs(item)))
    return Items(opening + closing, tuple(items))


def _such_that(inside: str, level: int) -> Structure | None:
    found = _SUCH_THAT.search(inside)
    if not found or found.start() == 0:
        return None
    family = f"{inside[: found.start()]}, {inside[found.end() :]}"
    if _family(family) != family:
        return Items("{}", (parse_structure(family, level=level + 1),))
    variable = _IN_REALS.sub("", inside[: found.start()]).strip()
    conditions = split_commas(inside[found.end() :], grouped=False)
    kept = [text for text in conditions if not _IN_REALS.fullmatch(text.strip().removeprefix(variable).strip())]
    return Condition(variable, parse_structure(", ".join(kept) or r"\mathbb{R}", level=level + 1))


def _clock(text: str) -> Clock | None:
    """``9:05``, ``9 a.m.``, ``20:34:00``; a ratio looks the same and is told apart where two are compared."""
    if not text[:1].isdigit() and not text.startswith((r"\text", "noon")):
        return None
    inner = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).strip().replace("{:}", ":")
    found = _HALF.fullmatch(inner)
    if not found or (":" not in inner and not found["half"]):
        return None
    hours, minutes, seconds = ([int(number) for number in found["numbers"].split(":")] + [0, 0])[:3]
    half = re.sub(r"[.\s]", "", found["half"] or "").lower()
    half = {"noon": "pm", "midnight": "am"}.get(half, half if half in ("am", "pm") else "")
    if minutes > 59 or seconds > 59 or hours > 24:
        return None
    return Clock((hours, minutes, seconds), half)


def _ratio(text: str, grouped: bool, level: int) -> Structure | None:
    terms = [term.strip() for term in split_top(text, _RATIO)]
    if not 2 <= len(terms) <= 8 or not all(terms):
        return None
    return Ratio(tuple(terms))


def _plus_minus(text: str, grouped: bool, level: int) -> Structure | None:
    if not _PLUS_MINUS.search(text):
        return None
    upper = _PLUS_MINUS.sub(lambda found: "+" if found[1] == "pm" else "-", text)
    lower = _PLUS_MINUS.sub(lambda found: "-" if found[1] == "pm" else "+", text)
    return Items("", tuple(parse_structure(part.strip().removeprefix("+"), level=level + 1) for part in (upper, lower)))


_READERS = (
    _mixed, _split_list, _without_points, _cases, _french, _split_union, _split_order, _split_equals, _matrix,
    _bracketed, _ratio, _plus_minus,
)  # fmt: skip
