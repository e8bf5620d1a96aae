r"""Quantities: a value with its unit taken off. A unit on one side only is fine, different units are not."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAMES = {
    "cm": "centimeter centimetre", "mm": "millimeter millimetre", "km": "kilometer kilometre", "m": "meter metre",
    "dm": "decimeter decimetre", "in": "inch inches", "ft": "foot feet", "yd": "yard", "mi": "mile",
    "kg": "kilogram", "g": "gram gm", "mg": "milligram", "lb": "pound lbs", "oz": "ounce", "l": "liter litre",
    "ml": "milliliter millilitre", "s": "second sec", "min": "minute mins", "h": "hour hr hrs", "ms": "millisecond",
    "day": "", "week": "", "month": "", "year": "yr", "mph": "mi/h", "kph": "km/h kmh", "usd": "$ dollar", "cent": "¢",
    "eur": "€ euro", "gbp": "£", "%": "percent pct", "deg": r"^\circ degree", "rad": "radian", "n": "newton",
    "j": "joule", "w": "watt", "v": "volt", "hz": "hertz", "pa": "pascal", "k": "kelvin", "mol": "mole",
    "unit": "", "celsius": r"^\circc degreecelsius", "fahrenheit": r"^\circf degreefahrenheit", "kw": "kilowatt",
    "kj": "kilojoule", "khz": "kilohertz", "mhz": "megahertz", "pm": "", "nm": "nanometer nanometre",
}  # fmt: skip
_CANONICAL = {alias: name for name, aliases in _NAMES.items() for alias in (name, *aliases.split())}
_BARE = sorted((name for name in _CANONICAL if re.fullmatch("[a-z]+", name)), key=len, reverse=True)
_EXPONENT = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
_TEXT_UNIT = rf"\\text\s*\{{[^{{}}]*\}}{_EXPONENT}"
_UNIT_NAME = rf"(?:{'|'.join(_BARE)})s?{_EXPONENT}"
_WORD_UNIT = r"(?<=[\s}\d])[a-zA-Z]{3,}(?:\s+[a-zA-Z]{2,}){0,2}" + _EXPONENT
_SUFFIX = re.compile(
    rf"(?P<value>.*?[\d)}}\]a-z!])(?:\s|\\,)*(?P<unit>(?:{_TEXT_UNIT}(?:\s*/\s*|\s*\\cdot\s*|\s)*)+"
    rf"|\\?%|\^\\circ\s*(?:\\text\s*\{{\s*[CFcf]\s*\}}|[CF])?|€|£"
    rf"|(?<=[\d}}\s,]){_UNIT_NAME}(?:\s*(?:/|per)\s*{_UNIT_NAME})?|{_WORD_UNIT})",
    re.DOTALL,
)
_CURRENCY = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<unit>[$€£]|\\text\s*\{\s*(?:USD|Rs\.?|\$)\s*\})\s*(?P<value>[-+]?[\d.\\(].*)", re.DOTALL
)
_BASE = re.compile(r"(?P<value>[\dA-Z]+)\s*_\s*(?:\{\s*(?P<base>\d+|\\text\s*\{\s*\w+\s*\})\s*\}|(?P<base1>\d+))")
_NOT_UNITS = re.compile(
    r"\b(?:or|and|not|no|nor|isn'?t|never|wrong|either|maybe|is|are|if|sqrt|sin|cos|tan|log|ln|exp|mod|pi|times|plus"
    r"|minus|over|to|million|billion|thousand|hundred|dozen)\b", re.IGNORECASE)  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """``text`` is the expression without its unit; ``unit`` the canonical unit or empty."""

    text: str
    unit: str = ""


def canonical_unit(text: str) -> str:
    r"""One spelling per unit: ``\text{square meters}``, ``m^{2}`` and ``m^2`` are all ``m^2``."""
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).lower().replace(r"\,", " ").replace("\\%", "%")
    plain = re.sub(r"\^\s*\{?\s*(-?\d)\s*\}?", r"^\1", plain).replace(".", "")
    plain = re.sub(r"\s*(?:\bper\b|/)\s*", "/", plain.strip())
    power = re.match(r"(square|sq|cubic|cu)\s+(.*)", plain)
    if power:
        plain = power[2] + ("^2" if power[1].startswith("sq") else "^3")
    parts = [re.sub(r"\s+", "", part) for part in re.split(r"(/|\^-?\d)", plain)]
    name = "".join(_singular(part) if index % 2 == 0 else part for index, part in enumerate(parts))
    return _CANONICAL.get(name, name)


def _singular(name: str) -> str:
    if name in _CANONICAL:
        return _CANONICAL[name]
    stem = name[:-1] if name.endswith("s") and not name.endswith("ss") else name
    return _CANONICAL.get(stem, stem)


def parse_quantity(text: str) -> Quantity:
    """Take off a currency sign, a unit, a percent sign or a number base."""
    found = _CURRENCY.fullmatch(text)
    if found:
        return Quantity(found["sign"] + found["value"].strip(), canonical_unit(found["unit"]))
    found = _BASE.fullmatch(text)
    if found:
        base = re.sub(r"\\text|[{}\s]", "", found["base"] or found["base1"])
        return Quantity(found["value"], f"base {base}")
    found = _SUFFIX.fullmatch(text)
    if not found:
        return Quantity(text)
    words = re.findall(r"[a-zA-Z]+", found["unit"].replace(r"\text", "").replace(r"\circ", ""))
    if len(words) > 4 or _NOT_UNITS.search(re.sub(r"\\text\s*\{|\}", " ", found["unit"])):
        return Quantity(text)
    return Quantity(found["value"].strip().removesuffix("\\"), canonical_unit(found["unit"]))
