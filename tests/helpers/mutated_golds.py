r"""Golds shaped like those of MATH, college and olympiad sets, and their wrong neighbours.

``draw_gold(random)`` makes one gold as a tree; ``mutants(gold, random)`` changes it in one place: a term or factor
dropped, two letters swapped, a sign, an exponent, an index, a number, a bracket or one side changed. A mutant may equal
its gold; ``same(gold, mutant)`` decides that exactly, with sympy on the trees and never on LaTeX.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

LETTERS = ["x", "y", "z", "a", "b", "c", "n", "m", "k", "t", "h", "l", "v", "r", "s", "p", "q", "g", "w", "j", "u"]
GREEK = [r"\theta", r"\alpha", r"\beta", r"\lambda"]
FUNCTIONS = ["sin", "cos", "tan", "ln"]


@dataclass(frozen=True)
class Tree:
    """``kind``: number, symbol (value: name and index), pi, i, add, multiply, divide, power, sqrt or a function."""

    kind: str
    value: object = None
    parts: tuple[Tree, ...] = ()


@dataclass(frozen=True)
class Gold:
    """``kind``: expression, tuple, list, set, interval, union, equation, function, inequality, matrix, …."""

    kind: str
    trees: tuple[Tree, ...]
    marks: tuple[str, ...] = ()  # brackets, a relation sign, names, or the shape


def number(value: int) -> Tree:
    return Tree("number", value)


def symbol(name: str, index: str = "") -> Tree:
    return Tree("symbol", (name, index))


# --- drawing -----------------------------------------------------------------------------------------------------


def _monomial(draw: random.Random, names: list[str], size: int = 12) -> Tree:
    factors: list[Tree] = [number(draw.choice([-1, 1]) * draw.randrange(2, size))] if draw.random() < 0.75 else []
    for name in draw.sample(names, k=draw.randrange(1, min(3, len(names)) + 1)):
        factor = symbol(name)
        factors.append(Tree("power", None, (factor, number(draw.randrange(2, 6)))) if draw.random() < 0.35 else factor)
    return factors[0] if len(factors) == 1 else Tree("multiply", None, tuple(factors))


def _polynomial(draw: random.Random, names: list[str]) -> Tree:
    terms = [_monomial(draw, names) for _ in range(draw.randrange(1, 4))]
    if draw.random() < 0.6:
        terms.append(number(draw.choice([-1, 1]) * draw.randrange(1, 80)))
    return terms[0] if len(terms) == 1 else Tree("add", None, tuple(terms))


def _surd(draw: random.Random) -> Tree:
    root = Tree("sqrt", None, (number(draw.choice([2, 3, 5, 6, 7, 10, 11, 13, 15])),))
    term = Tree("multiply", None, (number(draw.randrange(2, 9)), root)) if draw.random() < 0.6 else root
    if draw.random() < 0.5:
        term = Tree("add", None, (number(draw.choice([-1, 1]) * draw.randrange(1, 20)), term))
    return Tree("divide", None, (term, number(draw.randrange(2, 9)))) if draw.random() < 0.4 else term


def _constant(draw: random.Random) -> Tree:
    kind = draw.randrange(6)
    if kind == 0:
        return number(draw.randrange(-400, 4000))
    if kind == 1:
        return Tree("divide", None, (number(draw.randrange(1, 60)), number(draw.randrange(2, 30))))
    if kind == 2:
        return Tree("multiply", None, (number(draw.randrange(2, 40)), Tree("pi")))
    if kind == 3:
        return Tree(
            "add",
            None,
            (number(draw.randrange(-9, 10) or 3), Tree("multiply", None, (number(draw.randrange(2, 9)), Tree("i")))),
        )
    if kind == 4:
        return Tree("power", None, (number(draw.randrange(2, 12)), number(draw.randrange(2, 20))))
    return _surd(draw)


def _expression(draw: random.Random) -> Tree:
    names = draw.sample(LETTERS + GREEK, k=draw.randrange(1, 4))
    kind = draw.randrange(9)
    if kind <= 2:
        return _polynomial(draw, names)
    if kind == 3:
        return Tree("divide", None, (_polynomial(draw, names), _polynomial(draw, names)))
    if kind == 4:
        inner = _polynomial(draw, names[:1])
        return Tree("multiply", None, (number(draw.randrange(2, 9)), Tree(draw.choice(FUNCTIONS), None, (inner,))))
    if kind == 5:
        exponent = Tree("add", None, (symbol(names[0]), number(draw.choice([-2, -1, 1, 2]))))
        return Tree(
            "multiply", None, (_monomial(draw, names), Tree("power", None, (number(draw.randrange(2, 6)), exponent)))
        )
    if kind == 6:
        indexed = [symbol(names[0], index) for index in draw.sample(["1", "2", "3", "n", "n+1", "n-1", "k"], k=2)]
        return Tree("add", None, (indexed[0], Tree("multiply", None, (number(draw.randrange(2, 7)), indexed[1]))))
    if kind == 7:
        sums = [
            Tree("add", None, (symbol(name), number(draw.choice([-1, 1]) * draw.randrange(1, 9)))) for name in names
        ]
        return Tree("multiply", None, (symbol(names[0]), *sums))
    return Tree("add", None, (Tree("sqrt", None, (_polynomial(draw, names),)), _monomial(draw, names)))


def draw_gold(draw: random.Random) -> Gold:
    """One gold; about half of them are single expressions."""
    kind = draw.choice(
        ["expression"] * 8 + ["constant"] * 3
        + ["tuple", "list", "set", "interval", "union", "equation", "equation"]
        + ["function", "inequality", "matrix", "pieces", "named"]
    )  # fmt: skip
    if kind in ("expression", "constant"):
        return Gold("expression", (_expression(draw) if kind == "expression" else _constant(draw),))
    if kind in ("tuple", "list", "set"):
        make = _constant if draw.random() < 0.7 else _expression
        return Gold(kind, tuple(make(draw) for _ in range(draw.randrange(2, 5))))
    if kind in ("interval", "union"):
        ends = sorted(draw.sample(range(-30, 60), 2 if kind == "interval" else 4))
        marks = tuple(draw.choice(pair) for pair in ["([", ")]"] * (len(ends) // 2))
        return Gold(kind, tuple(number(end) for end in ends), marks)
    names = draw.sample(LETTERS[:6], k=2)
    if kind == "equation":
        return Gold(
            kind,
            (
                _polynomial(draw, names),
                _polynomial(draw, names) if draw.random() < 0.5 else number(draw.randrange(0, 30)),
            ),
        )
    if kind == "function":
        return Gold(kind, (_expression(draw),), (draw.choice(["y", "f(x)", "S_n", "P(t)"]),))
    if kind == "inequality":
        return Gold(
            kind, (_polynomial(draw, names), number(draw.randrange(-9, 30))), (draw.choice(["<", ">", r"\le", r"\ge"]),)
        )
    if kind == "matrix":
        return Gold(kind, tuple(_constant(draw) for _ in range(4)))
    if kind == "pieces":
        cut = number(draw.randrange(-5, 6))
        return Gold(kind, (_polynomial(draw, ["x"]), _polynomial(draw, ["x"]), cut))
    return Gold(kind, (_constant(draw), _constant(draw)), tuple(draw.sample(["x", "y", "z", "a", "b"], 2)))


# --- LaTeX -------------------------------------------------------------------------------------------------------


def latex(gold: Gold, draw: random.Random) -> str:
    """One of several spellings."""
    texts = [_latex(tree, draw) for tree in gold.trees]
    space = draw.choice(["", " "])
    match gold.kind:
        case "expression":
            return texts[0]
        case "tuple":
            return f"({f',{space}'.join(texts)})"
        case "list":
            return f",{space}".join(texts)
        case "set":
            return rf"\{{{f',{space}'.join(texts)}\}}"
        case "interval" | "union":
            pieces = [
                f"{gold.marks[k]}{texts[k]},{space}{texts[k + 1]}{gold.marks[k + 1]}" for k in range(0, len(texts), 2)
            ]
            return r" \cup ".join(pieces)
        case "equation":
            return f"{texts[0]}{space}={space}{texts[1]}"
        case "function":
            return f"{gold.marks[0]}{space}={space}{texts[0]}"
        case "inequality":
            return f"{texts[0]} {gold.marks[0]} {texts[1]}"
        case "matrix":
            return rf"\begin{{pmatrix}} {texts[0]} & {texts[1]} \\ {texts[2]} & {texts[3]} \end{{pmatrix}}"
        case "pieces":
            return rf"\begin{{cases}} {texts[0]} & x > {texts[2]} \\ {texts[1]} & x \le {texts[2]} \end{{cases}}"
    return ", ".join(f"{name} = {text}" for name, text in zip(gold.marks, texts, strict=True))


def _latex(tree: Tree, draw: random.Random) -> str:
    parts = tree.parts
    match tree.kind:
        case "number":
            return str(tree.value)
        case "symbol":
            name, index = tree.value  # pyright: ignore[reportGeneralTypeIssues]
            return f"{name}_{{{index}}}" if index else name
        case "pi":
            return r"\pi"
        case "i":
            return draw.choice(["i", "i", r"\mathrm{i}"])
        case "add":
            terms = [_latex(part, draw) for part in parts]
            space = draw.choice(["", " "])
            return terms[0] + "".join(
                f"{space}-{space}{term[1:]}" if term[0] == "-" else f"{space}+{space}{term}" for term in terms[1:]
            )
        case "multiply":
            return _product(parts, draw)
        case "divide":
            return rf"\frac{{{_latex(parts[0], draw)}}}{{{_latex(parts[1], draw)}}}"
        case "power":
            base, exponent = _latex(parts[0], draw), _latex(parts[1], draw)
            bare = parts[0].kind in ("symbol", "pi") or (parts[0].kind == "number" and not base.startswith("-"))
            short = len(exponent) == 1 and draw.random() < 0.5
            return f"{base if bare else f'({base})'}^{exponent if short else f'{{{exponent}}}'}"
        case "sqrt":
            return rf"\sqrt{{{_latex(parts[0], draw)}}}"
    inner = _latex(parts[0], draw)
    greek = parts[0].kind == "symbol" and inner.startswith("\\")
    return rf"\{tree.kind}{inner if greek else f'({inner})'}"


def _product(parts: tuple[Tree, ...], draw: random.Random) -> str:
    space = draw.choice(["", " ", " "])
    text = ""
    for index, part in enumerate(parts):
        factor = _latex(part, draw)
        if (
            index == 0
            and part.kind == "number"
            and part.value in (-1, 1)
            and len(parts) > 1
            and parts[1].kind not in ("number", "power")
        ):
            text = "-" if part.value == -1 else ""
            continue
        if part.kind == "add" or (index and factor.startswith("-")):
            factor = f"({factor})"
        digits = text and text[-1].isdigit() and factor[0].isdigit()
        command = text.rsplit("\\", 1)[-1].isalpha() and "\\" in text and factor[0].isalpha()
        text += (r" \cdot " if digits else " " if command or (text not in ("", "-") and space) else "") + factor
    return text


# --- mutating ----------------------------------------------------------------------------------------------------


def mutants(gold: Gold, draw: random.Random) -> Iterator[tuple[str, Gold]]:
    """``(what was done, the changed gold)``, at most a dozen, of every kind that the gold allows."""
    for name, change in _CHANGES.items():
        places = [(index, changed) for index, tree in enumerate(gold.trees) for changed in _everywhere(tree, change)]
        for index, changed in draw.sample(places, k=min(2, len(places))):
            trees = (*gold.trees[:index], changed, *gold.trees[index + 1 :])
            yield name, replace(gold, trees=trees)
    yield from _shapes(gold, draw)


def _everywhere(tree: Tree, change: Callable[[Tree], list[Tree]]) -> list[Tree]:
    found = change(tree)
    for index, part in enumerate(tree.parts):
        found += [
            replace(tree, parts=(*tree.parts[:index], changed, *tree.parts[index + 1 :]))
            for changed in _everywhere(part, change)
        ]
    return found


def _drop(tree: Tree) -> list[Tree]:
    if tree.kind in ("add", "multiply") and len(tree.parts) > 1:
        rest = [(*tree.parts[:k], *tree.parts[k + 1 :]) for k in range(len(tree.parts))]
        return [parts[0] if len(parts) == 1 else replace(tree, parts=parts) for parts in rest]
    if tree.kind in ("sqrt", "divide", "power", *FUNCTIONS):
        return [tree.parts[0]]
    return []


def _swap(tree: Tree) -> list[Tree]:
    names = sorted({part.value for part in _walk(tree) if part.kind == "symbol"}, key=str)
    swapped = [_renamed(tree, {names[0]: names[1], names[1]: names[0]})] if len(names) == 2 else []
    return swapped + ([replace(tree, parts=tree.parts[::-1])] if tree.kind in ("divide", "power") else [])


def _sign(tree: Tree) -> list[Tree]:
    if tree.kind == "number" and tree.value:
        return [number(-tree.value)]  # pyright: ignore[reportOperatorIssue]
    if tree.kind in ("symbol", "pi", "i", "sqrt"):
        return [Tree("multiply", None, (number(-1), tree))]
    return []


def _exponent(tree: Tree) -> list[Tree]:
    if tree.kind == "power" and tree.parts[1].kind == "number":
        return [replace(tree, parts=(tree.parts[0], number(tree.parts[1].value + step))) for step in (-1, 1)]  # pyright: ignore
    return [Tree("power", None, (tree, number(2)))] if tree.kind in ("symbol", "pi") else []


def _index(tree: Tree) -> list[Tree]:
    if tree.kind != "symbol":
        return []
    name, index = tree.value  # pyright: ignore[reportGeneralTypeIssues]
    others = {"1": "2", "2": "3", "3": "1", "n": "n+1", "n+1": "n", "n-1": "n", "k": "k+1"}
    return [symbol(name, others[index])] if index else [symbol(name, "1"), symbol("z" if name == "x" else "x")]


def _number(tree: Tree) -> list[Tree]:
    return [number(tree.value + step) for step in (-1, 1)] if tree.kind == "number" else []  # pyright: ignore


_CHANGES = {"drop": _drop, "swap": _swap, "sign": _sign, "exponent": _exponent, "index": _index, "number": _number}


def _walk(tree: Tree) -> Iterator[Tree]:
    yield tree
    for part in tree.parts:
        yield from _walk(part)


def _renamed(tree: Tree, names: dict[object, object]) -> Tree:
    value = names.get(tree.value, tree.value) if tree.kind == "symbol" else tree.value
    return Tree(tree.kind, value, tuple(_renamed(part, names) for part in tree.parts))


def _shapes(gold: Gold, draw: random.Random) -> Iterator[tuple[str, Gold]]:
    """Changes of the whole: one side, one item fewer, another order, another bracket, a sign turned round."""
    if gold.kind in ("equation", "inequality"):
        yield "side", Gold("expression", gold.trees[:1])
        yield "side", Gold("expression", gold.trees[1:])
    if gold.kind in ("tuple", "list", "set", "named"):
        drop = draw.randrange(len(gold.trees))
        kept = tuple(tree for index, tree in enumerate(gold.trees) if index != drop)
        marks = tuple(mark for index, mark in enumerate(gold.marks) if index != drop)
        yield "drop", replace(gold, trees=kept, marks=marks)
        yield "swap", replace(gold, trees=gold.trees[::-1])
    if gold.kind in ("interval", "union"):
        turned = {"(": "[", "[": "(", ")": "]", "]": ")"}
        place = draw.randrange(len(gold.marks))
        yield (
            "side",
            replace(
                gold, marks=tuple(turned[mark] if index == place else mark for index, mark in enumerate(gold.marks))
            ),
        )
        yield (
            "drop",
            Gold("interval", gold.trees[:2], gold.marks[:2])
            if gold.kind == "union"
            else Gold("tuple", gold.trees[::-1]),
        )
    if gold.kind == "inequality":
        other = {"<": ">", ">": "<", r"\le": "<", r"\ge": ">"}[gold.marks[0]]
        yield "side", replace(gold, marks=(other,))
    if gold.kind in ("matrix", "pieces"):
        yield "swap", replace(gold, trees=(gold.trees[1], gold.trees[0], *gold.trees[2:]))


# --- the oracle --------------------------------------------------------------------------------------------------


def same(gold: Gold, mutant: Gold) -> bool:
    """Exactly equal under the policy of docs/rewards.md: order matters in tuples, curves equal up to a factor."""
    if gold.kind == "function" and mutant.kind == "function" and gold.marks == mutant.marks:
        return _equal(gold.trees[0], mutant.trees[0])
    if gold.kind in ("list", "set") and mutant.kind == gold.kind:
        return _same_items(gold, mutant)
    if gold.kind == "equation" and mutant.kind == "expression":
        return _is_value(gold, mutant.trees[0])
    if gold.kind != mutant.kind or len(gold.trees) != len(mutant.trees):
        return False
    if gold.kind in ("equation", "inequality"):
        return _same_curve(gold, mutant)
    if gold.kind == "named":
        return dict(zip(gold.marks, map(_key, gold.trees), strict=True)) == dict(
            zip(mutant.marks, map(_key, mutant.trees), strict=True)
        )
    return gold.marks == mutant.marks and all(map(_equal, gold.trees, mutant.trees))


def _is_value(gold: Gold, side: Tree) -> bool:
    """A side of ``y = 17`` is its value if the other side is a letter that does not stand in it."""
    other = gold.trees[1] if side == gold.trees[0] else gold.trees[0]
    return other.kind == "symbol" and other not in _walk(side)


def _same_items(gold: Gold, mutant: Gold) -> bool:
    left, right = [[_key(tree) for tree in side.trees] for side in (gold, mutant)]
    if gold.kind == "list" and len(set(left)) < len(left):
        return sorted(map(str, left)) == sorted(map(str, right))
    return set(left) == set(right)


def _same_curve(gold: Gold, mutant: Gold) -> bool:
    import sympy

    left, right = (to_sympy(side.trees[0]) - to_sympy(side.trees[1]) for side in (gold, mutant))
    ratio = sympy.simplify(right / left)
    if not ratio.is_number or ratio == 0:
        return False
    if gold.kind == "equation":
        return True
    mirrored = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
    return mutant.marks[0] == (gold.marks[0] if ratio > 0 else mirrored[gold.marks[0]])


def _key(tree: Tree) -> object:
    import sympy

    return sympy.nsimplify(sympy.simplify(sympy.expand(to_sympy(tree))))


def _equal(a: Tree, b: Tree) -> bool:
    import sympy

    difference = to_sympy(a) - to_sympy(b)
    return difference == 0 or sympy.simplify(sympy.expand(difference)) == 0


def to_sympy(tree: Tree):
    """The tree as a sympy expression, with positive symbols, since logarithms and roots are compared where real."""
    import sympy

    parts = [to_sympy(part) for part in tree.parts]
    match tree.kind:
        case "number":
            return sympy.Integer(tree.value)
        case "symbol":
            return sympy.Symbol("_".join(tree.value), real=True)  # pyright: ignore[reportArgumentType, reportCallIssue]
        case "pi":
            return sympy.pi
        case "i":
            return sympy.I
        case "add":
            return sympy.Add(*parts)
        case "multiply":
            return sympy.Mul(*parts)
        case "divide":
            return parts[0] / parts[1]
        case "power":
            return parts[0] ** parts[1]
        case "sqrt":
            return sympy.sqrt(parts[0])
    return {"sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "ln": sympy.log}[tree.kind](parts[0])
