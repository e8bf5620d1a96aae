"""Text of an answer: Unicode to one spelling, LaTeX without typography. Nothing here decides what is right."""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_SUPERSCRIPT_RUN = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_SUBSCRIPT_RUN = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")

# NFKC would turn 5² into 52 and 3½ into 31/2, so superscripts and vulgar fractions are spelled out before it.
_SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\u2015\u2043\ufe58\ufe63\uff0d\u00ad", "-"),
        **dict.fromkeys("\u2009\u202f\u00a0\u2007\u2008", r"\,"),
        **{"×": r"\times ", "✕": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/"},
        **{"π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt"},
        **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx "},
        **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "±": r"\pm "},
        **{"ℝ": r"\mathbb{R}", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta "},
        **{"“": '"', "”": '"', "’": "'", "′": "'", "″": "''", "、": ",", "。": ".", "∖": r"\setminus ", "∶": ":"},
    }
)
_OVERLINED = re.compile("(?:[0-9]\u0305)+")

_DOUBLED = re.compile(r"\\\\(?:frac|dfrac|sqrt|begin|text|pi|left|cdot|times|infty|mathrm|cup|boxed)(?![a-zA-Z])")
_SINGLE_COMMAND = re.compile(r"(?<!\\)\\[a-zA-Z]")
_DOLLAR = re.compile(r"(?<!\\)\$")
_ANSWER_LABEL = re.compile(
    r"(?:\\text\s*\{\s*)?(?:the\s+)?(?:final\s+)?answer\s*(?:is\b|:)\s*:?\s*(?:\}\s*)?|(?:\\(?:therefore|because|implies|"
    r"Rightarrow|Longrightarrow)(?![a-zA-Z])\s*)+|\\text\s*\{[a-zA-Z ]+:\s*\}|答案?\s*[是为:]\s*",
    re.IGNORECASE,
)

_DROPPED = re.compile(
    r"\\(?:left|right)(?![a-zA-Z])\s*(?:\.(?!\d))?"
    r"|\\(?:bigg?|Bigg?)[lrm]?(?![a-zA-Z])"
    r"|\\(?:displaystyle|textstyle|limits|nolimits|tiny|small|normalsize|large|Large|LARGE|huge|Huge|underline)(?![a-zA-Z])"
    r"|\\(?:text)?color\s*\{[a-zA-Z]*\}|\\!"
)
_FUNCTION_NAME = r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|ar(?:sinh|cosh|tanh)|ln|log|lg|exp|gcd|lcm"
_FONTS = (
    r"math(?:bf|rm|it|sf|tt|cal|frak|scr|bb)|boldsymbol|bm|pmb|operatorname\*?|[mh]box|"
    r"text(?:rm|bf|it|sf|tt|normal|up)?"
)
_VECTOR = r"\\(?:mathbf|boldsymbol|bm|vec|overrightarrow)\s*(?:\{[^{}]*\}|[a-zA-Z])"
_RENAMED = [
    (re.compile(r"(?<=\d)\s*(?:,\s*\\!|\\!\s*,)\s*(?=\d{3})"), ","),
    (re.compile(r"\{,\}(?=\d{3}(?!\d))"), r"\\,"),
    (re.compile(r"(?<=\d)\{,\}(?=\d)"), "."),  # the decimal comma of a German text
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])|\\(?:nice|s|x|flat)frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![a-zA-Z])"), r"\\binom"),
    (re.compile(r"\\leqslant(?![a-zA-Z])|\\leqq?(?![a-zA-Z])|<="), r"\\le "),
    (re.compile(r"\\geqslant(?![a-zA-Z])|\\geqq?(?![a-zA-Z])|>="), r"\\ge "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\\neq(?![a-zA-Z])|\\not\s*=|=/=|(?<=\s)!=|(?<![\dnkm)\s])!="), r"\\ne "),
    (re.compile(r"\\l(?:vert|Vert)(?![a-zA-Z])|\\r(?:vert|Vert)(?![a-zA-Z])|\\[vV]ert(?![a-zA-Z])|(?<!\\)\\\|"), "|"),
    (re.compile(r"\\(?:lbrace|rbrace)(?![a-zA-Z])"), lambda found: r"\{" if found[0][1] == "l" else r"\}"),
    (re.compile(r"\\(?:lbrack|rbrack)(?![a-zA-Z])"), lambda found: "[" if found[0][1] == "l" else "]"),
    (re.compile(r"\\varnothing(?![a-zA-Z])"), r"\\emptyset "),
    (re.compile(r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"^([^{}]*)\\over(?![a-zA-Z])([^{}]*)$"), r"\\frac{\1}{\2}"),
    (re.compile(r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}"), r"\\binom{\1}{\2}"),
    (re.compile(r"^([^{}]*)\\choose(?![a-zA-Z])([^{}]*)$"), r"\\binom{\1}{\2}"),
    (re.compile(r"\\ast(?![a-zA-Z])"), r"\\cdot "),
    (re.compile(r"\\colon(?![a-zA-Z])|\{:\}"), ":"),
    (re.compile(r"\\(?:l|c|d)?dots[cbmio]?(?![a-zA-Z])|\.{3,}"), r"\\ldots "),
    (re.compile(r"(?<![\\a-zA-Z}\]])\{\s*\}(?=\s*[\^_])"), ""),
    (re.compile(r"\\(?:degree|textdegree)(?![a-zA-Z])"), r"^\\circ "),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}"), r"^\\circ "),
    (re.compile(r"\^\s*(?:\{\s*)?((?:\\prime\s*)+)(?:\})?"), lambda found: "'" * found[1].count("prime")),
    (re.compile(r"\\var(epsilon|theta|phi|sigma|rho)(?![a-zA-Z])"), r"\\\1"),
    (re.compile(r"\\([ij])math(?![a-zA-Z])"), r"\1"),
    (re.compile(rf"({_VECTOR})\s*\\times(?=\s*\(?\s*{_VECTOR})"), r"\1\\cross "),  # it does not commute
    # A bold or script letter is the letter, a bold arrow too; upright i, e and d are constants and the differential.
    (re.compile(r"\\(?:mathbf|boldsymbol|bm|pmb|textbf|mathit|textit|mathcal|mathfrak|mathscr|vec)\s*"
                r"(?:\{\s*([a-zA-Z]|\\[a-zA-Z]+)\s*\}|([a-zA-Z])(?![a-zA-Z]))"), r" \1\2 "),
    (re.compile(r"\\(?:hat|widehat)\s*\{?\s*([ijk])\s*\}?"), r" \1 "),
    (re.compile(r"\\(?:mathrm|operatorname|mathsf)\s*\{\s*([ied])\s*\}|\\text(?:rm)?\s*\{\s*([ie])\s*\}"), r" \1\2 "),
    (re.compile(rf"\\(?:{_FONTS})\s*\{{\s*({_FUNCTION_NAME})\s*\}}"), r"\\\1 "),
    (re.compile(r"\\(?:ar(?=[sct])|arc(?=(?:sin|cos|tan)h))((?:sin|cos|tan)h)(?![a-zA-Z])"), r"\\arc\1"),
    (re.compile(r"\\(?:math(?:bf|rm|it|sf|tt|cal|frak|scr)|boldsymbol|bm|operatorname\*?|text(?:rm|bf|it|sf|tt|normal|up)|mbox|hbox"
                r")\s*\{"), r"\\text{"),
    (re.compile(r"\\(?:bf|rm|it)(?![a-zA-Z])"), ""),
    (re.compile(r"\\mathbb\s*(?:\{\s*([A-Z])\s*\}|([A-Z]))"), r"\\mathbb{\1\2}"),
]  # fmt: skip
_SPACES = re.compile(r"(?<!\\)\\[;: >]|~|\\q?quad(?![a-zA-Z])|\\(?:thin|med|thick)space(?![a-zA-Z])|\s+")
_NESTED_GROUP = re.compile(r"\{\{([^{}]*)\}\}")


def normalise(text: str) -> str:
    """NFKC, zero-width and direction marks out, dashes to minus, every decimal digit to ASCII. Linear time."""
    if text.isascii():
        return text
    text = _VULGAR.sub(_spell_fraction, text)
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^{" + "".join(_SUPERSCRIPTS[c] for c in run[0]) + "}", text)
    text = _SUBSCRIPT_RUN.sub(lambda run: "_{" + "".join(_SUBSCRIPTS[c] for c in run[0]) + "}", text)
    text = _OVERLINED.sub(lambda run: rf"\overline{{{run[0].replace(chr(0x305), '')}}}", text)
    text = text.translate(_SYMBOLS)
    text = unicodedata.normalize("NFKC", text).translate(_SYMBOLS)
    return "".join(map(_plain_character, text))


def _spell_fraction(found: re.Match[str]) -> str:
    top, bottom = unicodedata.normalize("NFKC", found[0]).split("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _plain_character(character: str) -> str:
    if character.isascii():
        return character
    if unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f":
        return ""
    digit = unicodedata.decimal(character, None)
    return character if digit is None else str(digit)


def clean_latex(text: str) -> str:
    r"""Typography out: ``$``, ``\left``, ``\dfrac``, spacing and font commands, a full stop at the end.

    ``\,`` stays, because it separates thousands in numbers and words everywhere else.
    """
    text = text.strip()
    if text.isdigit():
        return text
    if _DOUBLED.search(text) and not _SINGLE_COMMAND.search(text):
        text = text.replace("\\\\", "\\")
    if "$" in text:
        text = _plain_dollars(text)
    if "\\" in text or "=" in text or "..." in text or "{" in text:
        for pattern, replacement in _RENAMED:
            text = pattern.sub(replacement, text)
        text = _DROPPED.sub("", text)
    text = _NESTED_GROUP.sub(r"{\1}", _SPACES.sub(" ", text))
    label = _ANSWER_LABEL.match(text)
    return strip_wrappers(text[label.end() :] if label else text)


def _plain_dollars(text: str) -> str:
    r"""``$…$`` around parts is typography; ``\$`` and a lone ``$`` are the currency."""
    if len(_DOLLAR.findall(text)) % 2 == 0:
        text = _DOLLAR.sub("", text)
    return text.replace(r"\$", "$")


def strip_wrappers(text: str) -> str:
    r"""Take off ``$…$``, ``\(…\)``, ``\[…\]``, a group around everything, and punctuation at the end."""
    while True:
        before = text
        text = text.strip().removesuffix(r"\,").removeprefix(r"\,").strip().rstrip(";\\").rstrip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        if text.endswith(","):
            text = text[:-1].rstrip()
        for start, end in ((r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$"), ("**", "**"), ("{", "}")):
            inner = text[len(start) : -len(end)]
            if (
                len(text) >= len(start) + len(end)
                and text.startswith(start)
                and text.endswith(end)
                and start not in inner
                and end not in inner
            ):
                text = inner
        if text == before:
            return text
