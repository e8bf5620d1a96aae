"""Tests taken apart, so that untrusted code never meets the expected value.

``assert f(2) == [4]`` becomes the call ``f(2)``, evaluated in the sandbox, and ``_0 == [4]``, evaluated on the plain
data that came back. That happens in this process if it is made of literals, arithmetic, comparisons, ``and``, ``or``,
``not`` and a few functions. If it needs the tests' helpers or other code, it happens in a second sandbox, which the
program never enters.
"""

from __future__ import annotations

import ast
import builtins
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOLERANCE = 1e-6
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
_BUILTINS = frozenset(dir(builtins))


class Unsupported(ValueError):
    """A test that cannot be judged without showing the program what is expected."""


class Opaque:
    """A value of a class of the program's own: it equals nothing and differs from nothing.

    ``items`` are what iterating over it gave, None if it does not iterate; ``truth`` is its truth value.
    """

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, items: list[Any] | None = None, truth: bool | None = None) -> None:
        self.items, self.truth = items, truth

    def _refuse(self, *_: object) -> bool:
        raise TypeError("not plain data")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse  # pyright: ignore[reportAssignmentType]

    def __bool__(self) -> bool:
        return self._refuse() if self.truth is None else self.truth

    def __iter__(self) -> Iterator[Any]:
        if self.items is None:
            raise TypeError("does not iterate")
        return iter(self.items)

    def __len__(self) -> int:
        return len(list(iter(self)))


@dataclass(frozen=True, kw_only=True)
class Assertion:
    """``setup`` and ``calls`` run in the program's sandbox; ``expression`` is over their values ``_0, …``.

    ``judged``: the expression needs the statements ``helpers`` and a sandbox of its own.
    """

    text: str
    setup: tuple[str, ...]
    calls: tuple[str, ...]
    expression: ast.expr
    helpers: tuple[str, ...] = ()
    judged: bool = False


@dataclass(frozen=True, kw_only=True)
class FunctionTest:
    """A call of the program's function, or of that method of its class ``Solution``, and the value expected."""

    text: str
    expected: Any

    @classmethod
    def of(cls, name: str, arguments: Sequence[Any], expected: Any) -> FunctionTest:
        if not name.isidentifier():
            raise Unsupported(f"fn_name={name!r} is not a name")
        given = ", ".join(map(repr, arguments))
        return cls(text=f"(Solution().{name} if 'Solution' in globals() else {name})({given})", expected=expected)

    def holds(self, value: Any) -> bool:
        """The expected value, or one in a list of its own as APPS writes it; tuples are lists, numbers to 1e-6."""
        single = isinstance(self.expected, list) and len(self.expected) == 1
        return same_data(value, self.expected) or (single and same_data(value, self.expected[0]))


def same_data(value: Any, expected: Any) -> bool:
    """Equal plain data: tuples are lists; a number with a fraction is equal to 1e-6, absolute or relative."""
    if isinstance(value, float) or isinstance(expected, float):
        return _same_float(value, expected)
    if isinstance(value, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(value) == len(expected) and all(map(same_data, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        keys = {str(key): item for key, item in value.items()}  # JSON has text keys only
        return keys.keys() == set(map(str, expected)) and all(same_data(keys[str(k)], v) for k, v in expected.items())
    return type(value) is not Opaque and value == expected


def _same_float(value: Any, expected: Any) -> bool:
    if not all(isinstance(side, (int, float)) for side in (value, expected)):
        return False
    return value == expected or abs(value - expected) <= TOLERANCE * max(1.0, abs(expected))


# --- assertions --------------------------------------------------------------------------------------------------


def parse_assertions(source: str) -> list[Assertion]:
    """The assertions of a test source, HumanEval's ``check(candidate)`` included, each with what stands before it.

    Statements that name something of the program run beside it; imports run on both sides; the rest is the judge's,
    and beside the program only what a call takes as its input.
    """
    statements = _inlined(ast.parse(source).body)
    scope = _Scope(statements)
    assertions: list[Assertion] = []
    setup: list[ast.stmt] = []
    for statement in statements:
        if isinstance(statement, ast.Assert):
            assertions.append(_assertion(statement, scope, setup))
            setup = []
        elif any(isinstance(node, ast.Assert) for node in ast.walk(statement)):
            raise Unsupported(f"an assertion inside a compound statement: {ast.unparse(statement)[:80]}")
        else:
            setup.append(statement)
    if not assertions:
        raise Unsupported("no assertion")
    return assertions


def _assertion(statement: ast.Assert, scope: _Scope, setup: Sequence[ast.stmt]) -> Assertion:
    text, split = ast.unparse(statement), _Split(scope)
    expression = split.visit(statement.test)
    if not split.calls:
        raise Unsupported(f"nothing of the program is tested by: {text}")
    for part in setup:
        if scope.needs_program(part):
            _refuse_to_show(part, ast.unparse(part))
    return Assertion(
        text=text,
        setup=tuple(ast.unparse(part) for part in setup if scope.runs_beside_program(part)),
        calls=tuple(split.calls),
        expression=expression,
        helpers=tuple(ast.unparse(part) for part in setup if not scope.needs_program(part)),
        judged=split.judged,
    )


def _refuse_to_show(node: ast.AST, text: str) -> None:
    """A comparison, or a function of the tests, beside the program would show it what is expected."""
    shown = (ast.Compare, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    if any(isinstance(part, shown) for part in ast.walk(node)):
        raise Unsupported(f"it would run beside the program: {text[:80]}")


def _inlined(statements: Sequence[ast.stmt]) -> list[ast.stmt]:
    """``def check(candidate): …`` and ``check(f)`` as ``candidate = f`` and the body."""
    checks: dict[str, ast.FunctionDef] = {}
    result: list[ast.stmt] = []
    for statement in statements:
        call = statement.value if isinstance(statement, ast.Expr) else None
        if isinstance(statement, ast.FunctionDef) and _is_check(statement):
            checks[statement.name] = statement
        elif isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in checks and call.args:
            check = checks.pop(call.func.id)
            result += [ast.parse(f"{check.args.args[0].arg} = {ast.unparse(call.args[0])}").body[0], *check.body]
        else:
            result.append(statement)
    return [*checks.values(), *result]


def _is_check(function: ast.FunctionDef) -> bool:
    return len(function.args.args) == 1 and any(isinstance(node, ast.Assert) for node in ast.walk(function))


class _Scope:
    """Which names of a test source are the tests' own, and which are the program's."""

    def __init__(self, statements: Sequence[ast.stmt]) -> None:
        self.defined: dict[str, ast.stmt] = {}
        for statement in statements:
            if not isinstance(statement, (ast.Assert, ast.Expr)) and not self.needs_program(statement):
                self.defined |= dict.fromkeys(_bound(statement), statement)
        inputs = [node for part in statements for node in ast.walk(part) if self._is_program_call(node)]
        inputs += [part for part in statements if not isinstance(part, ast.Assert) and self.needs_program(part)]
        self.inputs = {name for node in inputs for name in _named(node)} & set(self.defined)
        for name in sorted(self.inputs):  # an input made of another one
            self.inputs |= {other for other in _named(self.defined[name]) if other in self.defined}

    def _is_program_call(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and self.needs_program(node.func)

    def needs_program(self, node: ast.AST) -> bool:
        """Does it name something that neither the tests nor Python define?"""
        return any(name not in _BUILTINS and name not in self.defined for name in _named(node) - _bound(node))

    def runs_beside_program(self, statement: ast.stmt) -> bool:
        if self.needs_program(statement) or isinstance(statement, (ast.Import, ast.ImportFrom)):
            return True
        return isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and bool(
            _bound(statement) & self.inputs
        )

    def helper_in(self, node: ast.AST) -> str:
        """The tests' function or class that an input of the program calls, if any: it would have to run beside it."""
        kinds = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
        return next((name for name in sorted(_named(node)) if isinstance(self.defined.get(name), kinds)), "")


def _named(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _bound(node: ast.AST) -> set[str]:
    """Names that the code itself binds: targets, arguments, imports, definitions."""
    names: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            names.add(part.id)
        elif isinstance(part, ast.arg):
            names.add(part.arg)
        elif isinstance(part, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            names.add(part.name)
        elif isinstance(part, ast.alias):
            names.add((part.asname or part.name).split(".")[0])
    return names


class _Split(ast.NodeTransformer):
    """Replace what needs the program by ``_0, _1, …`` and collect it; note what this process cannot evaluate."""

    def __init__(self, scope: _Scope) -> None:
        self.scope, self.calls, self.judged = scope, [], False
        self.calls: list[str]

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.BinOp) and type(node.op) not in _ARITHMETIC:
            raise Unsupported(f"operator of {ast.unparse(node)}")
        if isinstance(node, _LOCAL):
            return self.generic_visit(node)
        if not self.scope.needs_program(node):
            self.judged |= not (isinstance(node, ast.Call) and _is_local(node))
            return self.generic_visit(node)
        if isinstance(node, ast.Call) and not self.scope.needs_program(node.func):
            return self._call(node)
        return self._from_program(node)

    def _call(self, node: ast.Call) -> ast.AST:
        """A function of the tests or of Python over values of the program."""
        self.judged |= ast.unparse(node.func) not in _FUNCTIONS
        node.args = [self.visit(argument) for argument in node.args]
        node.keywords = [self.visit(keyword) for keyword in node.keywords]
        return node

    def _from_program(self, node: ast.AST) -> ast.AST:
        text = ast.unparse(node)
        if not isinstance(node, ast.Call) or any(isinstance(part, ast.Compare) for part in ast.walk(node.func)):
            _refuse_to_show(node, text)
        helper = self.scope.helper_in(node)
        if helper:
            raise Unsupported(f"the tests' {helper} would run beside the program: {text[:80]}")
        self.calls.append(text)
        return ast.Name(id=f"_{len(self.calls) - 1}", ctx=ast.Load())


def _is_local(call: ast.Call) -> bool:
    return ast.unparse(call.func) in _FUNCTIONS


# --- evaluating --------------------------------------------------------------------------------------------------


def holds(assertion: Assertion, values: Sequence[Any]) -> bool:
    """Is the assertion true of the values that its calls gave? Anything that goes wrong is a no."""
    try:
        return bool(_evaluate(assertion.expression, values))
    except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError, Unsupported):
        return False


def judgement(assertion: Assertion, values: Sequence[Any], index: int) -> list[dict[str, Any]]:
    """What the judge's sandbox runs for the assertion: its helpers, the values as literals, and the question."""
    bindings = [f"_{number} = {literal(value)}" for number, value in enumerate(values)]
    name = f"_verdict_{index}"
    condition = ast.unparse(assertion.expression)
    question = f"try:\n    {name} = bool({condition})\nexcept Exception:\n    {name} = False"
    statements = [*assertion.helpers, *bindings, question]
    return [{"text": text, "statement": True} for text in statements] + [{"text": name, "statement": False}]


JUDGE_SOURCE = """nan, inf = float("nan"), float("inf")
class _Opaque:
    def __init__(self, items, truth): self.items, self.truth = items, truth
    def _refuse(self, *others): raise TypeError("not plain data")
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = None
    def __bool__(self): return self._refuse() if self.truth is None else self.truth
    def __iter__(self): return iter(self.items)
    def __len__(self): return len(self.items)
"""


def literal(value: Any) -> str:
    """Plain data as Python source."""
    if isinstance(value, Opaque):
        return f"_Opaque({literal(value.items)}, {value.truth!r})"
    if isinstance(value, (list, tuple, set)):
        inside = ", ".join(map(literal, value))
        if isinstance(value, set):
            return f"{{{inside}}}" if value else "set()"
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
    return repr(value)


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
    """The built-in value that ``sandbox.child.plain`` wrote down."""
    if not isinstance(value, dict):
        return [undo_plain(item) for item in value] if isinstance(value, list) else value
    kind, content = value["t"], value["v"]
    if kind == "dict":
        return {undo_plain(key): undo_plain(item) for key, item in content}
    if kind in ("list", "tuple", "set"):
        return {"list": list, "tuple": tuple, "set": set}[kind](undo_plain(item) for item in content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    items, truth = content or (None, None)
    truth = truth if isinstance(truth, bool) else None
    return Opaque(None if items is None else [undo_plain(item) for item in items], truth)
