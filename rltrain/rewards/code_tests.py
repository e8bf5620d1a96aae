"""Assertions taken apart, so that untrusted code never meets the expected value.

``assert f(2) == [4]`` becomes the call ``f(2)``, evaluated in the sandbox, and ``_0 == [4]``, evaluated here on the
plain data that came back. What can be evaluated here: literals, arithmetic, comparisons, ``and``, ``or``, ``not`` and a
few functions.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        abs, round, len, sorted, set, list, tuple, dict, sum, min, max, all, any, str, int, float, bool, frozenset,
    )
} | {"math.isclose": math.isclose, "isclose": math.isclose}  # fmt: skip
_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_UNARY: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
}  # fmt: skip
_LOCAL = (
    ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.BinOp,
    ast.expr_context, ast.cmpop, ast.boolop, ast.unaryop, ast.operator, ast.keyword,
)  # fmt: skip


class Unsupported(ValueError):
    """A test that this process cannot judge."""


class Opaque:
    """A value of a class of the program's own: it equals nothing, differs from nothing, is neither true nor false."""

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def _refuse(self, *_: object) -> bool:
        raise TypeError("not plain data")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __len__ = __contains__ = _refuse  # pyright: ignore


@dataclass(frozen=True, kw_only=True)
class Assertion:
    """``setup`` statements, then ``calls``, run in the sandbox; ``expression`` over their values ``_0, _1, …`` here."""

    text: str
    setup: tuple[str, ...]
    calls: tuple[str, ...]
    expression: ast.expr


def parse_assertions(source: str) -> list[Assertion]:
    """The assertions of a test source, HumanEval's ``check(candidate)`` included, each with what stands before it."""
    assertions: list[Assertion] = []
    setup: list[str] = []
    for statement in _inlined(ast.parse(source).body):
        if isinstance(statement, ast.Assert):
            text, split = ast.unparse(statement), _Split()
            expression = split.visit(statement.test)
            if not split.calls:
                raise Unsupported(f"nothing of the program is tested by: {text}")
            assertions.append(Assertion(text=text, setup=tuple(setup), calls=tuple(split.calls), expression=expression))
            setup = []
        elif any(isinstance(node, ast.Assert) for node in ast.walk(statement)):
            raise Unsupported(f"an assertion inside a compound statement: {ast.unparse(statement)[:80]}")
        else:
            setup.append(ast.unparse(statement))
    if not assertions:
        raise Unsupported("no assertion")
    return assertions


def _inlined(statements: Sequence[ast.stmt]) -> list[ast.stmt]:
    """``def check(candidate): …`` and ``check(f)`` as ``candidate = f`` and the body."""
    checks: dict[str, ast.FunctionDef] = {}
    result: list[ast.stmt] = []
    for statement in statements:
        call = statement.value if isinstance(statement, ast.Expr) else None
        if isinstance(statement, ast.FunctionDef) and len(statement.args.args) == 1:
            checks[statement.name] = statement
        elif isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in checks and call.args:
            check = checks.pop(call.func.id)
            result += [ast.parse(f"{check.args.args[0].arg} = {ast.unparse(call.args[0])}").body[0], *check.body]
        else:
            result.append(statement)
    return [*checks.values(), *result]


class _Split(ast.NodeTransformer):
    """Replace what needs the program by ``_0, _1, …`` and collect it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Call) and ast.unparse(node.func) in _FUNCTIONS:
            node.args = [self.visit(argument) for argument in node.args]
            node.keywords = [self.visit(keyword) for keyword in node.keywords]
            return node
        if isinstance(node, ast.BinOp) and type(node.op) not in _ARITHMETIC:
            raise Unsupported(f"operator of {ast.unparse(node)}")
        if isinstance(node, _LOCAL):
            return self.generic_visit(node)
        self.calls.append(ast.unparse(node))
        return ast.Name(id=f"_{len(self.calls) - 1}", ctx=ast.Load())


def holds(assertion: Assertion, values: Sequence[Any]) -> bool:
    """Is the assertion true of the values that its calls gave? Anything that goes wrong is a no."""
    try:
        return bool(_evaluate(assertion.expression, values))
    except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError, Unsupported):
        return False


def _evaluate(node: ast.expr, values: Sequence[Any]) -> Any:
    def go(child: ast.expr) -> Any:
        return _evaluate(child, values)

    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return values[int(node.id[1:])]
        case ast.List() | ast.Tuple() | ast.Set():
            kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
            return kind(go(item) for item in node.elts)
        case ast.Dict():
            return {go(key): go(value) for key, value in zip(node.keys, node.values, strict=True) if key is not None}
        case ast.Compare():
            sides = [go(side) for side in (node.left, *node.comparators)]
            pairs = zip(node.ops, sides, sides[1:], strict=False)
            return all(_COMPARE[type(op)](left, right) for op, left, right in pairs)
        case ast.BoolOp():
            combine = all if isinstance(node.op, ast.And) else any
            return combine(go(value) for value in node.values)
        case ast.UnaryOp():
            return _UNARY[type(node.op)](go(node.operand))
        case ast.BinOp():
            return _arithmetic(node.op, go(node.left), go(node.right))
        case ast.Call():
            keywords = {keyword.arg: go(keyword.value) for keyword in node.keywords if keyword.arg}
            return _FUNCTIONS[ast.unparse(node.func)](*(go(argument) for argument in node.args), **keywords)
    raise Unsupported(ast.unparse(node))


def _arithmetic(kind: ast.operator, left: Any, right: Any) -> Any:
    numbers = isinstance(left, (int, float, complex)) and isinstance(right, (int, float, complex))
    joined = isinstance(kind, ast.Add) and isinstance(left, (str, list, tuple)) and type(left) is type(right)
    if not numbers and not joined:
        raise Unsupported("arithmetic on something else than numbers")
    return _ARITHMETIC[type(kind)](left, right)


def undo_plain(value: Any) -> Any:
    """The built-in value that ``sandbox_child.plain`` wrote down."""
    if not isinstance(value, dict):
        return [undo_plain(item) for item in value] if isinstance(value, list) else value
    kind, content = value["t"], value["v"]
    if kind == "dict":
        return {undo_plain(key): undo_plain(item) for key, item in content}
    if kind in ("list", "tuple", "set"):
        return {"list": list, "tuple": tuple, "set": set}[kind](undo_plain(item) for item in content)
    if kind == "bytes":
        return bytes.fromhex(content)
    return complex(*content) if kind == "complex" else Opaque()
