r"""Quantities: a value with its unit taken off. A unit on one side only is fine, different units are not.

What follows a number is a unit only if it is a known abbreviation of two letters or more, or words without a digit, an
operator or a meaning for the value. One bare letter is a variable; one letter in ``\text{}`` or ``\mathrm{}`` is a unit
if there is one of that name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

from rltrain.rewards.verifier.number import parse_number
from rltrain.rewards.verifier.words import is_word

MAX_SCALED = 10**15
_NAMES = {
    "cm": "centimeter centimetre 厘米 zentimeter", "mm": "millimeter millimetre 毫米",
    "km": "kilometer kilometre 千米 公里",
    "m": "meter metre 米", "dm": "decimeter decimetre 分米", "in": "inch inches", "ft": "foot feet", "yd": "yard",
    "mi": "mile", "kg": "kilogram 千克 公斤 kilogramm", "g": "gram gm gms 克 gramm", "mg": "milligram 毫克",
    "t": "ton tonne 吨", "lb": "pound lbs", "oz": "ounce", "l": "liter litre 升", "ml": "milliliter millilitre 毫升",
    "s": "second sec secs 秒 sekunde sekunden", "min": "minute mins 分钟 分 minuten",
    "h": "hour hr hrs 小时 时 stunde stunden",
    "ms": "millisecond", "day": "天 日 tag tage tagen", "week": "周 woche wochen", "month": "月 monat monate",
    "year": "yr yrs 年 岁 jahr jahre", "usd": "$ dollar 美元", "cent": "¢ 分钱", "eur": "€ euro 欧元", "gbp": "£",
    "yuan": "元 ¥ rmb", "inr": "₹ rs rupee", "%": "percent pct prozent 个百分点", "deg": "° degree 度 grad",
    "rad": "radian",
    "n": "newton 牛", "j": "joule 焦", "w": "watt 瓦", "v": "volt 伏", "a": "amp ampere", "hz": "hertz",
    "pa": "pascal",
    "k": "kelvin", "mol": "mole", "unit": "", "c": "celsius degc degcelsius 摄氏度",
    "f": "fahrenheit degf degfahrenheit",
    "kw": "kilowatt", "kj": "kilojoule", "khz": "kilohertz", "mhz": "megahertz", "nm": "nanometer nanometre",
    "ohm": r"Ω ω \omega", "个": "", "人": "", "apple": "",
}  # fmt: skip
_CANONICAL = {alias: name for name, aliases in _NAMES.items() for alias in (name, *aliases.split())}
_COMPOUND = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h", "mps": "m/s", "cc": "cm^3"}
_BARE = ("cm mm km dm ft yd kg mg lb lbs oz ml mol mph kph kmh min mins sec secs hr hrs hour inch inches usd khz mhz "
         "cc deg gm gms pct rad").split()  # fmt: skip
_LETTERS = "mgshlLtNJWVAKCF"
_EXPONENT = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
_TEXT_UNIT = rf"\\text\s*\{{[^{{}}]*\}}{_EXPONENT}"
_BARE_NAME = rf"(?:{'|'.join(sorted(_BARE, key=len, reverse=True))})(?![a-zA-Z]){_EXPONENT}"
_SLASH_NAME = rf"(?:[a-zA-Z]{{1,3}}){_EXPONENT}"
_DEGREES = r"\^\\circ\s*(?:\\text\s*\{\s*[CFcf]\s*\}|[CF](?![a-zA-Z]))?"
_ARC = re.compile(
    r"(?P<degrees>\d+(?:\.\d+)?)\s*\^\\circ\s*(?P<minutes>\d+(?:\.\d+)?)\s*'(?:\s*(?P<seconds>\d+(?:\.\d+)?)\s*'')?"
)
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])|(?<![a-zA-Z])(?:sin|cos|tan)")
_HAN = "\u4e00-\u9fff"
_SUFFIX = re.compile(
    rf"(?P<value>.*?[\d)}}\]a-z!.'])(?:\s|\\,)*"
    rf"(?:(?P<text>(?:{_TEXT_UNIT}(?:\s*/\s*|\s*\\cdot\s*|\s|\\,)*)+)|(?P<sign>\\?%|{_DEGREES}|€|£|¢|\$)"
    rf"|(?P<bare>(?<=[\d}}\s,)]){_BARE_NAME}(?:\s*(?:/|per)\s*{_SLASH_NAME})?)"
    rf"|(?P<words>(?<=[\s}}\d)])[a-zA-Z]{{3,}}(?:\s+[a-zA-Z]{{2,}}){{0,3}}{_EXPONENT})|(?P<han>[{_HAN}]+(?:/[{_HAN}]+)?))",
    re.DOTALL,
)
_LETTER_SUFFIX = re.compile(
    rf"(?P<value>[-+\d.,/\s]*\d)(?:\s|\\,)*(?P<unit>[a-zA-Z]{{1,2}}{_EXPONENT}(?:\s*/\s*{_SLASH_NAME})?)"
)
_CURRENCY = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<unit>[$€£¥₹]|\\text\s*\{\s*(?:USD|Rs\.?|\$|€)\s*\}|(?:USD|Rs\.?)(?=\s*\d))\s*"
    r"(?P<value>[-+]?[\d.\\(].*)", re.DOTALL
)  # fmt: skip
_BASE = re.compile(
    r"\(?\s*(?:\\text\s*\{)?(?P<value>\d[\dA-Fa-f]*|[A-F][\dA-F]*\d[\dA-F]*|[a-f][\da-f]*\d[\da-f]*)\}?\s*\)?\s*"
    r"(?:_\s*(?:\{\s*\(?(?:\\text\s*\{)?\s*(?:base\s*)?(?P<base>\w+)\s*\}?\s*\)?\s*\}|(?P<digit>\d))"
    r"|(?:\\text\s*\{)?\s*\(?\s*(?:in\s+)?base[\s-]*\}?\s*(?P<word>\w+)\s*\)?\s*\}?)"
)
_MODULUS = re.compile(
    r"(?P<value>.*?)\s*\(?\s*(?:\\[pb]?mod|\\text\s*\{\s*\(?mod\s*\}|(?<![a-z\\])mod)(?![a-z])\s*\{?\s*(?P<modulus>\d+)\s*\}?\s*\)?"
)
_NUMBER_WORDS = {
    name: value
    for value, name in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
} | {"sixteen": 16, "binary": 2, "octal": 8, "decimal": 10, "hex": 16}
_SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "lakh": 10**5, "crore": 10**7, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8,
}  # fmt: skip
_SCALED = re.compile(
    rf"(?P<value>[-+]?\s*[$€£]?[\d.,\\/{{}}a-z]*?[\d}}])(?:\s|\\,)*(?:(?P<text>\\text\s*\{{)\s*)?"
    rf"(?:(?P<scale>{'|'.join(name for name in _SCALES if name.isascii())})s?(?![a-zA-Z])"
    r"|(?P<han>[百千万亿])(?![克米瓦焦卡帕赫伏]))"
    r"\s*(?P<rest>.*)", re.DOTALL
)  # fmt: skip
_NOT_UNITS = re.compile(
    r"\b(?:or|and|not|no|nor|isn'?t|never|wrong|either|neither|maybe|perhaps|possibly|alternatively|otherwise|else|is|are|"
    r"was|if|unless|when|where|since|because|so|then|hence|wait|think|guess|unknown|unsure|actually|sorry|except|but|i|we|"
    r"sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|mod|modulo|pi|times(?!\s*$)|plus|minus|over|to|into|by|upon|divided|"
    r"multiplied|than|least|most|at|about|around|between|under|above|below|up|approx|approximately|roughly|remainder|"
    r"half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|twelfths?|hundredths?|"
    r"thousandths?|squared|cubed|factorials?|tuple|double|twice|thrice|triple|(?:double|halve|triple|quadruple)d|"
    r"percent\s+of|score|gross|dozens?|hundreds?|thousands?|lakhs?|crores?|[mbtrzq]+illion(?:th)?s?|bn|mil|mn|bil|"
    r"(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|sixty|seventy|"
    r"eighty|ninety)(?!-)|inverse|reciprocal|negative(?=\s*$)|power|root|base|point|infinity|infinite|inclusive|"
    r"exclusive|wurzel|hoch|mal|oder|und)\b",
    re.IGNORECASE)  # fmt: skip
_HAN_VALUE = re.compile(
    "[以万亿百十兆半或和与至到不非多少左右倍余负约正零一二三四五六七八九之几每平方根次]|千(?![克米瓦焦卡帕])"
)


@dataclass(frozen=True)
class Quantity:
    """``text`` is the expression without its unit; ``unit`` the canonical unit or empty; ``raw`` the whole text.

    ``bare`` says that the unit stood there without ``\\text``, so that its letters may have been variables.
    """

    text: str
    unit: str = ""
    raw: str = field(default="", compare=False)
    bare: bool = field(default=False, compare=False)


def canonical_unit(text: str) -> str:
    r"""One spelling per unit: ``\text{square meters}``, ``m^{2}`` and ``m^2`` are ``m^2``; ``m/s`` is ``m s^-1``."""
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).replace(r"\,", " ").replace("\\%", "%")
    plain = re.sub(r"\^\s*\{?\s*(-?\d)\s*\}?", r"^\1", plain.replace(r"^\circ", "deg").replace(r"\cdot", "*")).lower()
    plain = re.sub(r"\s+\^", "^", re.sub(r"\([^()]*\)|\.", "", plain))
    plain = re.sub(r"(\w+) squared", r"\1^2", re.sub(r"(\w+) cubed", r"\1^3", plain))
    powers: dict[str, int] = {}
    for sign, factor in _factors(plain):
        for name, power in _named(factor):
            powers[name] = powers.get(name, 0) + sign * power
    return " ".join(name if power == 1 else f"{name}^{power}" for name, power in sorted(powers.items()) if power)


def _factors(plain: str) -> list[tuple[int, str]]:
    """The factors between ``*``, ``/`` and "per", with -1 for the one after a division."""
    pieces = re.split(r"\s*(\*|/|\bper\b|-(?=[a-z]))\s*", plain.strip())
    signs = [1, *(-1 if mark in ("/", "per") else 1 for mark in pieces[1::2])]
    return [(sign, piece.strip()) for sign, piece in zip(signs, pieces[::2], strict=True) if piece.strip()]


def _named(factor: str) -> list[tuple[str, int]]:
    prefix = re.match(r"(square|sq|cubic|cu)\s+(.*)", factor)
    if prefix:
        power = 2 if prefix[1].startswith("sq") else 3
        return [(name, power) for name, _ in _named(prefix[2])]
    parts = [re.fullmatch(r"([^\s^]+)(?:\^(-?\d))?", word) for word in factor.split()]
    if all(parts) and (len(parts) == 1 or all(_singular(part[1]) in _NAMES for part in parts if part)):
        named = []
        for part in parts:
            assert part
            compound = _COMPOUND.get(part[1])
            power = int(part[2] or 1)
            named += (
                [(name, sign * size) for sign, piece in _factors(compound) for name, size in _named(piece)]
                if compound
                else [(_singular(part[1]), power)]
            )
        return named
    return [("".join(_singular(word) for word in factor.split()), 1)]


def _singular(name: str) -> str:
    if name in _CANONICAL:
        return _CANONICAL[name]
    stem = name[:-1] if name.endswith("s") and not name.endswith("ss") else name
    return _CANONICAL.get(stem, stem)


def parse_quantity(text: str) -> Quantity:
    """Take off a currency sign, a scale word, a unit, a percent sign or a number base."""
    found = _BASE.fullmatch(text)
    if found:
        return _based(found) or Quantity(text, raw=text)
    found = _MODULUS.fullmatch(text)
    if found and found["value"]:
        return Quantity(found["value"], f"mod {int(found['modulus'])}", text)
    found = _SCALED.fullmatch(text)
    if found and not _NOT_UNITS.search(found["rest"]):
        scaled = _scaled(found)
        if scaled:
            return parse_quantity(scaled)
    found = _CURRENCY.fullmatch(text)
    if found:
        inner, unit = parse_quantity(found["value"].strip()), canonical_unit(found["unit"])
        rate = "^-1" in inner.unit  # $18 per day
        return Quantity(found["sign"] + inner.text, f"{unit} {inner.unit}" if rate else unit, text)
    return _suffixed(text)


def _suffixed(text: str) -> Quantity:
    arc = _ARC.fullmatch(text)
    if arc:
        degrees, minutes, seconds = (Fraction(arc[part] or 0) for part in ("degrees", "minutes", "seconds"))
        return Quantity(_plain(degrees + minutes / 60 + seconds / 3600), "deg", text)
    if r"^\circ" in text and not _ANGLE_FUNCTION.search(text) and not re.search(r"\d\s*'", text):
        plain = text.replace(r"^\circ", "").rstrip()  # degrees all through, such as 180^\circ - x
        if not re.search(r"[a-zA-Z}]\s*$", plain) or not re.search(r"\\circ\s*(?:[CF]|\\text)", text):
            return Quantity(plain, "deg", text)
    found = _SUFFIX.fullmatch(text)
    if not found:
        return Quantity(text, raw=text)
    value, unit = (
        found["value"].strip().removesuffix("\\"),
        (found.group(3) or found.group(4) or text[found.end("value") :]),
    )
    bare = not (found["text"] or found["sign"] or found["han"])
    if not _is_unit(found, value):
        return Quantity(text, raw=text)
    if found["sign"] and "circ" in found["sign"] and _ANGLE_FUNCTION.search(value):
        return Quantity(text, raw=text)
    return Quantity(value, canonical_unit(unit), text, bare)


def _is_unit(found: re.Match[str], value: str) -> bool:
    if found["sign"]:
        return True
    if found["han"]:
        return len(found["han"]) <= 6 and not _HAN_VALUE.search(found["han"])
    if found["text"]:
        return _is_text_unit(found["text"])
    if _NOT_UNITS.search(found["bare"] or found["words"]) or not _is_constant(value):
        return False
    return bool(found["bare"]) or all(
        is_word(word) or word in _CANONICAL for word in re.findall("[a-zA-Z]+", found["words"])
    )


def _is_text_unit(text: str) -> bool:
    inside = " ".join(re.findall(r"\\text\s*\{([^{}]*)\}", text)).strip()
    outside = re.sub(r"\\text\s*\{[^{}]*\}", "", text)
    plain = re.sub(r"(?<=[a-zA-Z)])\s*\^\s*\{?-?[123]\}?", "", inside.replace(r"\,", " ").replace(r"^\circ", "°"))
    words = re.findall(r"[^\W\d_]+", plain)
    if not re.fullmatch(
        r"[^\W\d_]?(?:[^\W\d_]|[°$€£¥₹%().\-'/* \\])*", plain.replace(r"\cdot", "*").replace("\\%", "%")
    ):
        return False
    if re.search(r"(?<![^\W\d_])-|-(?![^\W\d_])", plain) or re.search(r"[+=<>,]", outside):
        return False
    if len(words) == 1 and len(words[0]) == 1 and words[0].isascii() and words[0] not in _LETTERS:
        return False
    return len(words) <= 5 and not _NOT_UNITS.search(plain) and not _HAN_VALUE.search(plain)


def _is_constant(value: str) -> bool:
    """No letters but those of commands: ``3``, ``\\frac{1}{2}``, ``2\\sqrt{3}``, ``2\\pi``."""
    return not re.search(
        r"(?<![a-zA-Z\\])[a-zA-Z]", re.sub(r"\\(?:frac|sqrt|pi|cdot|times|approx)(?![a-zA-Z])", " ", value)
    )


def _scaled(found: re.Match[str]) -> str | None:
    number = parse_number(found["value"].strip().lstrip("$€£").strip())
    if number is None or number.value > MAX_SCALED:
        return None
    value = number.value * _SCALES[found["scale"] or found["han"]]
    rest = found["rest"].strip()
    if found["text"]:
        rest = "" if rest == "}" else rf"\text{{{rest}"
    sign = next((mark for mark in "$€£" if mark in found["value"]), "")
    return f"{sign}{_plain(value)} {rest}".strip()


def _plain(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _based(found: re.Match[str]) -> Quantity | None:
    name = (found["base"] or found["digit"] or found["word"]).lower()
    base = int(name) if name.isdigit() else _NUMBER_WORDS.get(name, 0)
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in found["value"]):
        return None
    digits = found["value"].upper().lstrip("0") or "0"
    return Quantity(digits, "" if base == 10 else f"base {base}", found[0])


def letter_unit(text: str) -> Quantity | None:
    """The reading of ``10 m`` as ten metres, for a text whose other side names that unit."""
    found = _LETTER_SUFFIX.fullmatch(text)
    return Quantity(found["value"].strip(), canonical_unit(found["unit"])) if found else None
