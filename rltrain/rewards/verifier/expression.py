r"""A small LaTeX expression parser: numbers, symbols, sums, products, powers, roots and common functions.

Bounded by construction: at most 512 characters, 256 tokens, 64 levels. What it does not know it refuses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

from rltrain.rewards.verifier.number import Number, parse_number

MAX_CHARACTERS, MAX_TOKENS, MAX_DEPTH = 512, 256, 64

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,3}(?:(?:,|\\,)\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d*(?:\\overline\{\d+\})?)?|\.\d+"
    r"(?:\\overline\{\d+\})?)|(?P<command>\\[a-zA-Z]+)"
    r"|(?P<word>(?:sqrt|arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|pi)(?![a-zA-Z]))"
    r"|(?P<symbol>[a-zA-Z])|(?P<op>\*\*|!!|'+|[-+*/^_!()\[\]{}|]))"
)
_GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega Pi ell hbar nabla".split()
)
_ACCENTS = set("vec hat bar overline tilde dot ddot overrightarrow widehat widetilde".split())
_FUNCTIONS = {"ln": "log", "log": "log10", "lg": "log10", "exp": "exp"} | {
    name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")
} | {f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")} | {
    "tg": "tan", "ctg": "cot", "arctg": "atan"}  # fmt: skip
_INVERSES = {name: f"a{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")}
_UPRIGHT = re.compile(r"\\text\s*\{\s*([a-zA-Z]|\d+(?:\.\d+)?)\s*\}")
_THIN = re.compile(r"\\,(?!\d{3}(?!\d))")
_DERIVATIVE = re.compile(
    r"\\frac\s*\{\s*d[^{}]*\}\s*\{\s*d\s*[a-zA-Z](?:\^\{?\d\}?)?\s*\}|(?<![a-zA-Z])d\s*[a-z]\s*/\s*d\s*[a-z](?![a-zA-Z])"
)


class Unparsed(ValueError):
    """Not an expression of this grammar."""


@dataclass(frozen=True)
class Node:
    """``kind`` is number, symbol, an operator or a function, ``apply`` for ``f``; ``value`` a Fraction or a name."""

    kind: str
    value: Any = None
    children: tuple[Node, ...] = ()

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True, eq=False)
class Expression:
    """A parsed expression; ``decimal`` says that it contains a rounded number. ``values`` remembers evaluations."""

    root: Node
    decimal: bool
    values: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, number: Number) -> Expression:
        """A literal as an expression."""
        return cls(Node("number", number.value), number.decimal)

    @cached_property
    def symbols(self) -> frozenset[str]:
        return frozenset(node.value for node in self.root.walk() if node.kind == "symbol")

    @cached_property
    def kinds(self) -> frozenset[str]:
        """The kinds of its nodes, and ``i`` if the imaginary unit is among them."""
        nodes = list(self.root.walk())
        return frozenset(node.kind for node in nodes) | {"i" for node in nodes if node.value == "i"}

    @cached_property
    def operators(self) -> int:
        """Operations left to do; a sign and a simple fraction are none."""
        return sum(
            node.kind not in ("number", "symbol", "constant", "negate", "degree", "apply") for node in self.root.walk()
        )


class _Parser:
    """Recursive descent: sum > product (with juxtaposition) > sign > power > postfix > atom."""

    def __init__(self, text: str) -> None:
        self.tokens = list(_tokens(text))
        if len(self.tokens) > MAX_TOKENS:
            raise Unparsed(f"more than {MAX_TOKENS} tokens")
        self.position = 0
        self.depth = 0
        self.decimal = False
        self.bars = 0
        self.after_power = -1

    def peek(self) -> str:
        return self.tokens[self.position][1] if self.position < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.position][0] if self.position < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if not token or (expected is not None and token != expected):
            raise Unparsed(f"expected {expected or 'more'}, found {token or 'the end'}")
        self.position += 1
        return token

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unparsed("nested too deep")
        node = self.product()
        while self.peek() in ("+", "-"):
            kind = "add" if self.take() == "+" else "subtract"
            node = Node(kind, None, (node, self.product()))
        self.depth -= 1
        return node

    def product(self) -> Node:
        node = self.signed()
        while True:
            token = self.peek()
            if token in ("*", r"\cdot", r"\times"):
                self.take()
                node = Node("multiply", None, (node, self.signed()))
            elif token in ("/", r"\div"):
                self.take()
                node = _divide(node, self.signed())
            elif self.starts_factor():
                node = self.juxtapose(node)
            else:
                return node

    def starts_factor(self) -> bool:
        token, kind = self.peek(), self.kind()
        if token == "|":
            return self.bars == 0
        if kind == "number":  # 2^6 3^5 is a product, 1 2 is nothing
            return self.tokens[self.position - 1][0] != "number" or self.position == self.after_power
        return kind in ("symbol", "word") or token in ("(", "[", "{") or (
            kind == "command" and token not in (r"\cdot", r"\times", r"\div", r"\rfloor", r"\rceil", r"\circ")
        )  # fmt: skip

    def juxtapose(self, left: Node) -> Node:
        mixed = self.peek() == r"\frac" and self.tokens[self.position - 1][0] == "number"
        right = self.power()
        if mixed and left.kind == "number" and right.kind == "number" and left.value.denominator == 1:
            return Node("number", left.value + right.value)
        return Node("multiply", None, (left, right))

    def signed(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unparsed("nested too deep")
        if self.peek() in ("-", "+"):
            negative = self.take() == "-"
            node = self.signed()
            node = _negate(node) if negative else node
        else:
            node = self.power()
        self.depth -= 1
        return node

    def power(self) -> Node:
        base = self.postfix()
        if self.at_degree():
            self.position += 2
            return self.angle(base)
        if self.peek() in ("^", "**"):
            self.take()
            node = Node("power", None, (base, self.exponent()))
            self.after_power = self.position
            return node
        return base

    def at_degree(self) -> bool:
        return self.peek() == "^" and self.tokens[self.position + 1 : self.position + 2] == [("command", r"\circ")]

    def angle(self, degrees: Node) -> Node:
        r"""``30^\circ 15'``: degrees and what follows of minutes and seconds, in radians."""
        total = degrees
        for mark, parts in (("'", 60), ("''", 3600)):
            following = self.tokens[self.position + 1 : self.position + 2]
            if self.kind() == "number" and following == [("op", mark)]:
                minutes = self.number(self.take())
                self.take()
                total = Node("add", None, (total, _divide(minutes, Node("number", Fraction(parts)))))
        return Node("degree", None, (total,))

    def exponent(self) -> Node:
        if self.peek() in ("-", "+"):
            return _negate(self.exponent_after_sign()) if self.take() == "-" else self.exponent_after_sign()
        return self.exponent_after_sign()

    def exponent_after_sign(self) -> Node:
        node = self.atom()
        if self.peek() in ("^", "**"):
            self.take()
            return Node("power", None, (node, self.exponent()))
        return node

    def postfix(self) -> Node:
        node = self.atom()
        while self.peek() in ("!", "!!"):
            node = Node("factorial" if self.take() == "!" else "factorial2", None, (node,))
        if node.kind == "number" and self.peek() in ("'", "''"):  # minutes or seconds of arc
            parts = Node("number", Fraction(60 if self.take() == "'" else 3600))
            node = Node("degree", None, (_divide(node, parts),))
        return node

    def group(self, close: str) -> Node:
        bars, self.bars = self.bars, 0
        node = self.sum()
        self.bars = bars
        self.take(close)
        return node

    def argument(self) -> Node:
        r"""A TeX argument: a group, a command, or one digit or letter (``\frac12``, ``\sqrt2``)."""
        if self.kind() == "number" and len(self.peek()) > 1 and self.peek().isdigit():
            kind, token = self.tokens[self.position]
            self.tokens[self.position] = (kind, token[1:])
            return Node("number", Fraction(int(token[0])))
        return self.atom()

    def atom(self) -> Node:
        kind, token = self.kind(), self.take()
        if kind == "number":
            return self.number(token)
        if token in ("(", "[", "{"):
            return self.group({"(": ")", "[": "]", "{": "}"}[token])
        if token == "|":
            self.bars += 1
            node = self.sum()
            self.bars -= 1
            self.take("|")
            return Node("abs", None, (node,))
        name = token.lstrip("\\")
        if kind == "symbol" or name in _GREEK:
            return self.symbol(name)
        if name == "pi":
            return Node("constant", "pi")
        reader = {"frac": self.fraction, "sqrt": self.root, "binom": self.binomial}.get(name)
        if reader:
            return reader()
        if name in ("lfloor", "lceil"):
            return Node(name[1:], None, (self.group(f"\\r{name[1:]}"),))
        if name in _FUNCTIONS:
            return self.function(name)
        if name in _ACCENTS:
            return self.accented(name)
        raise Unparsed(f"unknown {token}")

    def number(self, token: str) -> Node:
        number = parse_number(token)
        if number is None:
            raise Unparsed(f"not a number: {token}")
        self.decimal |= number.decimal
        return Node("number", number.value)

    def accented(self, accent: str) -> Node:
        r"""``\bar{x}`` and ``\overrightarrow{AB}`` are names of their own."""
        start = self.position
        self.argument_text()
        inside = [(kind, token) for kind, token in self.tokens[start : self.position] if token not in "{}"]
        if not inside or any(kind not in ("symbol", "command") for kind, _ in inside):
            raise Unparsed(f"\\{accent} of an expression")
        same = {"overline": "bar", "widehat": "hat", "widetilde": "tilde", "overrightarrow": "vec"}
        return self.symbol(f"{same.get(accent, accent)} {''.join(token for _, token in inside)}")

    def symbol(self, name: str) -> Node:
        if self.peek().startswith("'"):
            name += self.take()
        if self.peek() == "_":
            self.take()
            start = self.position
            self.argument_text()
            name += "_" + "".join(token for _, token in self.tokens[start : self.position]).strip("{}")
        if name.startswith("f") and self.peek() == "(":  # f(x)^2 is not f(x^2)
            return Node("apply", name, (self.atom(),))
        return Node("constant", name) if name in ("e", "i") else Node("symbol", name)

    def argument_text(self) -> None:
        if self.take() == "{":
            while self.take() != "}":
                if self.peek() == "{":
                    raise Unparsed("a group inside an index")

    def fraction(self) -> Node:
        top, bottom = self.argument(), self.argument()
        return _divide(top, bottom)

    def root(self) -> Node:
        degree = None
        if self.peek() == "[":
            self.take()
            degree = self.group("]")
        radicand = self.argument()
        return Node("sqrt", None, (radicand,)) if degree is None else Node("root", None, (radicand, degree))

    def binomial(self) -> Node:
        return Node("binomial", None, (self.argument(), self.argument()))

    def function(self, name: str) -> Node:
        function, base, outer = _FUNCTIONS[name], None, None
        if self.peek() == "_" and function == "log10":
            self.take()
            base = self.argument()
        if self.peek() == "^":
            self.take()
            outer = self.exponent()
        argument = self.function_argument()
        if outer is not None and outer.kind == "number" and outer.value == -1 and name in _INVERSES:
            return Node(_INVERSES[name], None, (argument,))
        node = Node(function, None, (argument,))
        if base is not None:
            node = Node("divide", None, (Node("log", None, (argument,)), Node("log", None, (base,))))
        node = node if outer is None else Node("power", None, (node, outer))
        if self.peek() in ("^", "**") and self.tokens[self.position - 1][1] == ")":
            self.take()
            node = Node("power", None, (node, self.exponent()))
        return node

    def function_argument(self) -> Node:
        r"""``(…)`` or ``{…}`` alone; otherwise a product without signs, so ``\sin 2x + 1`` is ``sin(2x) + 1``."""
        if self.peek() == "(":  # \cos(x)^2 is (\cos x)^2
            return self.atom()
        if self.peek() in ("{", "|"):
            return self.power()
        node = self.power()
        while self.kind() == "symbol" or self.peek().lstrip("\\") in _GREEK | {"pi", "frac"}:
            node = Node("multiply", None, (node, self.power()))
        return node


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    if _DERIVATIVE.search(text):
        raise Unparsed("a derivative")
    text = _THIN.sub(" ", _UPRIGHT.sub(r" \1 ", text))
    position, end = 0, len(text.rstrip())
    while position < end:
        found = _TOKEN.match(text, position)
        if not found or found.lastgroup is None:
            raise Unparsed(f"unexpected {text[position : position + 10]!r}")
        position = found.end()
        yield found.lastgroup, found[found.lastgroup]


def _negate(node: Node) -> Node:
    return Node("number", -node.value) if node.kind == "number" else Node("negate", None, (node,))


def _divide(top: Node, bottom: Node) -> Node:
    if top.kind == bottom.kind == "number" and bottom.value and _whole(top.value, bottom.value):
        return Node("number", top.value / bottom.value)
    return Node("divide", None, (top, bottom))


def _whole(*values: Fraction) -> bool:
    return all(value.denominator == 1 for value in values)


@lru_cache(maxsize=4096)
def parse_expression(text: str) -> Expression:
    """Parse the whole text, or raise ``Unparsed``."""
    if len(text) > MAX_CHARACTERS:
        raise Unparsed(f"longer than {MAX_CHARACTERS} characters")
    parser = _Parser(text)
    try:
        root = parser.sum()
    except RecursionError:
        raise Unparsed("nested too deep") from None
    if parser.position < len(parser.tokens):
        raise Unparsed(f"unexpected {parser.peek()!r}")
    return Expression(root, parser.decimal)
