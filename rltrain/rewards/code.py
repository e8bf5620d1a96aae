"""Code rewards: run the program of a completion on its tests, in the sandbox; the verdict is made here.

Expected values and the tests' helpers never enter the process that runs the program. A stdin test compares what it
printed; a function test and an assertion are taken apart: the child evaluates the calls and sends plain data back, and
the comparison happens in this process, or in a second sandbox where it needs the tests' code. So neither ``__eq__``
tricks, nor replaced builtins, nor ``os._exit(0)``, nor reading files or frames can pass a test.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from rltrain.config import RewardConfig
from rltrain.errors import require
from rltrain.registry import register
from rltrain.rewards.code_tests import (
    JUDGE_SOURCE,
    TOLERANCE,
    Assertion,
    FunctionTest,
    Unsupported,
    holds,
    judgement,
    parse_assertions,
    undo_plain,
)
from rltrain.rewards.sandbox.pool import Limits
from rltrain.rewards.sandbox.program import ProgramResult, run_program
from rltrain.rewards.verifier.extract import after_thinking
from rltrain.types import Context, Group, Mean, Metric, Scores

CodeStatus = Literal[
    "passed", "wrong", "exception", "timeout", "memory", "output", "no_result", "no_answer", "gold_error", "infra"
]
STATUSES: tuple[CodeStatus, ...] = CodeStatus.__args__  # pyright: ignore[reportAttributeAccessIssue]
MAX_SOURCE_CHARACTERS = 65536

_FENCE = re.compile(r"[ ]{0,3}```[ \t]*(?P<language>[\w+#-]*)[^`\n]*")
_PYTHON = "python py python3".split()
# What the harnesses of function tests provide: their starter code names List and Optional without importing them.
_PREAMBLE = """from typing import *
import bisect, collections, functools, heapq, itertools, math, re, string
from collections import *
from functools import *
from math import gcd, inf
"""


@dataclass(frozen=True, kw_only=True)
class CodeVerdict:
    """``passed`` of ``total`` tests, the status of the first that failed, and why. ``score`` None abstains."""

    score: float | None
    status: CodeStatus
    passed: int
    total: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class StdinTest:
    """The program reads ``stdin`` and must print ``stdout``; blanks at line ends and empty last lines are free.

    On a line of numbers the blanks between them are free too. A number with a fraction is right to 1e-6, absolute or
    relative; whole numbers must be equal.
    """

    stdin: str
    stdout: str


@dataclass(kw_only=True)
class CodeConfig(RewardConfig):
    """``kind``: binary (all tests) or continuous (the share of tests passed). Tests: see :func:`read_tests`.

    ``deadline_s`` bounds one program run, ``batch_deadline_s`` the batch; what has no turn by then abstains.
    """

    kind: str = "binary"
    deadline_s: float = 5.0
    batch_deadline_s: float = 300.0
    memory_mib: int = 1024  # memory of one program
    output_kib: int = 1024  # longest output of one program
    workers: int = 2  # programs that run at once
    max_tests: int = 20  # tests of a problem that are run

    def __post_init__(self) -> None:
        require(self.kind in ("binary", "continuous"), f"reward.kind={self.kind}: unknown; set binary or continuous")
        require(self.deadline_s > 0, f"reward.deadline_s={self.deadline_s}: must be > 0 seconds")
        require(self.batch_deadline_s > 0, f"reward.batch_deadline_s={self.batch_deadline_s}: must be > 0 seconds")
        require(self.workers >= 1, f"reward.workers={self.workers}: set at least 1")
        require(self.max_tests >= 1, f"reward.max_tests={self.max_tests}: set at least 1")


def extract_code(completion: str) -> str | None:
    """The last closed block marked as Python after the thinking; without one, the last that is not marked; or None."""
    text, _ = after_thinking(completion)
    blocks = list(_blocks((text or "").replace("\r\n", "\n")))
    marked = [source for language, source in blocks if language in _PYTHON]
    sources = marked or [source for language, source in blocks if not language]
    return sources[-1] if sources and len(sources[-1]) <= MAX_SOURCE_CHARACTERS else None


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """``(language, source)`` of every closed block."""
    language, lines = None, []
    for line in text.split("\n"):
        fence = _FENCE.fullmatch(line)
        if fence is None:
            lines.append(line)
        elif language is not None and not fence["language"]:
            yield language, "".join(f"{line}\n" for line in lines)
            language = None
        else:
            language, lines = fence["language"].lower(), []


# --- reading tests -----------------------------------------------------------------------------------------------

Test = StdinTest | FunctionTest | Assertion


def read_tests(answer: str, meta: Mapping[str, Any]) -> list[Test]:
    """Tests from ``meta["tests"]``, or from ``answer`` as JSON or source.

    ``{"inputs": […], "outputs": […]}`` for stdin and stdout, or, with ``"fn_name"``, for a function's arguments and
    value (APPS, TACO); ``[{"input", "output", "testtype"}]`` (LiveCodeBench, the name in ``meta["fn_name"]`` or
    ``meta["metadata"]["func_name"]``); or assertions as a list of statements or one source text. ``Unsupported`` for
    tests that this process cannot judge.
    """
    tests = meta.get("tests", answer)
    if isinstance(tests, str):
        with contextlib.suppress(ValueError):
            tests = json.loads(tests)
    if isinstance(tests, Sequence) and not isinstance(tests, str) and tests and isinstance(tests[0], Mapping):
        functional = tests[0].get("testtype") == "functional"
        pairs = [(test["input"], test["output"]) for test in tests]
        return _pairs(pairs, _function_name({}, meta) if functional else "")
    if isinstance(tests, Mapping):
        return _pairs(list(zip(tests["inputs"], tests["outputs"], strict=True)), _function_name(tests, meta))
    source = tests if isinstance(tests, str) else "\n".join(tests)
    return [*parse_assertions(source)]


def _function_name(tests: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    metadata = meta.get("metadata") or {}
    if isinstance(metadata, str):
        metadata = json.loads(metadata)
    names = (tests.get("fn_name"), meta.get("fn_name"), metadata.get("fn_name"), metadata.get("func_name"))
    return next((str(name) for name in names if name), "")


def _pairs(pairs: Sequence[tuple[Any, Any]], name: str) -> list[Test]:
    if name:
        return [FunctionTest.of(name, *_arguments(given, expected)) for given, expected in pairs]
    lines = [StdinTest(stdin=_lines_of(given), stdout=_lines_of(expected)) for given, expected in pairs]
    if not any(test.stdout.strip() for test in lines):
        raise Unsupported("no test expects any output")
    return [*lines]


def _arguments(given: Any, expected: Any) -> tuple[list[Any], Any]:
    """A list of arguments as it is; of a text (LiveCodeBench), each line and the value as JSON."""
    if isinstance(given, str):
        return [json.loads(line) for line in given.splitlines() if line.strip()], json.loads(str(expected))
    return (given if isinstance(given, list) else [given]), expected


def _lines_of(text: Any) -> str:
    return "\n".join(map(str, text)) if isinstance(text, list) else str(text)


# --- running -----------------------------------------------------------------------------------------------------


def verify_code(completion: str, answer: str, meta: Mapping[str, Any], config: CodeConfig) -> CodeVerdict:
    """Run the completion's program on every test. Never raises."""
    try:
        tests = read_tests(answer, meta)[: config.max_tests]
    except (Unsupported, SyntaxError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return CodeVerdict(score=None, status="gold_error", passed=0, total=0, reason=f"tests: {error}")
    source = extract_code(completion)
    if source is None:
        return CodeVerdict(score=0.0, status="no_answer", passed=0, total=len(tests), reason="no closed code block")
    return _verdict(_results(source, tests, config), len(tests), config.kind)


Result = tuple[CodeStatus, str]


def _results(source: str, tests: Sequence[Test], config: CodeConfig) -> list[Result]:
    match tests[0]:
        case StdinTest():
            return _run_stdin(source, tests, config)
        case FunctionTest():
            return _run_functions(source, tests, config)
    return _run_assertions(source, tests, config)


def _verdict(results: Sequence[Result], total: int, kind: str) -> CodeVerdict:
    passed = sum(status == "passed" for status, _ in results)
    status, reason = next((result for result in results if result[0] != "passed"), ("passed", ""))
    score = None if status == "infra" else float(passed == total) if kind == "binary" else passed / total
    return CodeVerdict(score=score, status=status, passed=passed, total=total, reason=reason)


def _run(source: str, config: CodeConfig, **request: Any) -> ProgramResult:
    limits = Limits(memory_mib=config.memory_mib, cpu_s=int(config.deadline_s) + 1)
    return run_program(
        source, deadline_s=config.deadline_s, output_bytes=1024 * config.output_kib, limits=limits, **request
    )


def _fault(run: ProgramResult) -> Result:
    return ("no_result", "ended before the test") if run.status == "ok" else (run.status, f"exit code {run.exit_code}")


def _run_stdin(source: str, tests: Sequence[Any], config: CodeConfig) -> list[Result]:
    """One process per test; in binary mode the first failure ends it."""
    results: list[Result] = []
    for test in tests:
        run = _run(source, config, stdin=test.stdin)
        if run.status != "ok":
            results.append(_fault(run))
        elif same_output(run.output.decode(errors="replace"), test.stdout):
            results.append(("passed", ""))
        else:
            results.append(("wrong", "output differs") if run.output.strip() else ("no_result", "printed nothing"))
        if config.kind == "binary" and results[-1][0] != "passed":
            break
    return results


def same_output(output: str, expected: str) -> bool:
    """Line by line the same text, or the same numbers (:class:`StdinTest`)."""
    lines = [[line.rstrip() for line in text.rstrip().splitlines()] for text in (output, expected)]
    return len(lines[0]) == len(lines[1]) and all(map(_same_line, *lines))


def _same_line(output: str, expected: str) -> bool:
    if output == expected:
        return True
    found, wanted = output.split(), expected.split()
    return len(found) == len(wanted) and all(map(_same_token, found, wanted)) and all(map(_decimal, wanted))


def _same_token(output: str, expected: str) -> bool:
    found, wanted = _decimal(output), _decimal(expected)
    if found is None or wanted is None:
        return False
    if found == wanted:
        return True
    whole = wanted == wanted.to_integral_value() and not re.search(r"[.eE]", expected)
    return not whole and abs(found - wanted) <= Decimal(str(TOLERANCE)) * max(Decimal(1), abs(wanted))


def _decimal(token: str) -> Decimal | None:
    if len(token) > 400 or not re.fullmatch(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?", token):
        return None
    return Decimal(token)


def _run_functions(source: str, tests: Sequence[Any], config: CodeConfig) -> list[Result]:
    """All calls in one process; one that fails ends it, and the tests after it have no result."""
    run = _run(_PREAMBLE + source, config, calls=[{"text": test.text, "statement": False} for test in tests])
    values = _values(run.output)[: len(tests)]
    results: list[Result] = [
        ("passed", "") if test.holds(value) else ("wrong", test.text[:200])
        for test, value in zip(tests, values, strict=False)
    ]
    return results + [_fault(run)] * (len(tests) - len(values))


def _run_assertions(source: str, tests: Sequence[Any], config: CodeConfig) -> list[Result]:
    """All assertions in one process; a call that fails ends it, and the tests after it have no result."""
    calls = []
    for test in tests:
        calls += [{"text": text, "statement": True} for text in test.setup]
        calls += [{"text": text, "statement": False} for text in test.calls]
    run = _run(source, config, calls=calls)
    values, split = _values(run.output), []
    for test in tests:
        split.append(values[: len(test.calls)])
        values = values[len(test.calls) :]
    complete = [len(returned) == len(test.calls) for test, returned in zip(tests, split, strict=True)]
    if any(test.judged and there for test, there in zip(tests, complete, strict=True)):
        judged = _judged(tests, split, complete, config)
        if judged is None:
            return [("infra", "the judge's sandbox gave no answer")] * len(tests)
    else:
        judged = {}
    results: list[Result] = []
    for index, (test, returned) in enumerate(zip(tests, split, strict=True)):
        if not complete[index]:
            results.append(_fault(run))
        else:
            right = judged[index] if index in judged else holds(test, returned)
            results.append(("passed", "") if right else ("wrong", test.text[:200]))
    return results


def _judged(
    tests: Sequence[Assertion], values: Sequence[list[Any]], complete: Sequence[bool], config: CodeConfig
) -> dict[int, bool] | None:
    """The assertions that need the tests' own code, in a sandbox without the program; None if it failed."""
    calls, judged_tests = [], []
    for index, test in enumerate(tests):
        if test.judged and complete[index]:
            calls += judgement(test, values[index], index)
            judged_tests.append(index)
        else:
            calls += [{"text": text, "statement": True} for text in test.helpers]
    run = _run(JUDGE_SOURCE, config, calls=calls)
    verdicts = _values(run.output)
    return dict(zip(judged_tests, map(bool, verdicts), strict=True)) if len(verdicts) == len(judged_tests) else None


def _values(output: bytes) -> list[Any]:
    """The values the child sent, up to the first line that is not one: it is under the program's control."""
    values: list[Any] = []
    for line in output.splitlines():
        try:
            reply = json.loads(line)
            if "value" in reply:
                values.append(undo_plain(reply["value"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            break
    return values


@register("reward", "code", CodeConfig)
def code(groups: Sequence[Group], config: CodeConfig, context: Context) -> Scores:
    """Grade every completion, ``workers`` programs at a time; equal programs of a problem run once."""
    end = time.monotonic() + config.batch_deadline_s
    items = {
        (index, extract_code(each.text)): each.text for index, group in enumerate(groups) for each in group.completions
    }

    def grade(item: tuple[tuple[int, str | None], str]) -> CodeVerdict:
        (index, _), text = item
        if time.monotonic() > end:
            return CodeVerdict(
                score=None, status="infra", passed=0, total=0, reason="no turn before the batch deadline"
            )
        problem = groups[index].prompt.problem
        return verify_code(text, problem.answer, problem.meta, config)

    with ThreadPoolExecutor(config.workers) as threads:
        verdicts = dict(zip(items, threads.map(grade, items.items()), strict=True))
    rows = [
        [verdicts[index, extract_code(each.text)] for each in group.completions] for index, group in enumerate(groups)
    ]
    every = [verdict for row in rows for verdict in row]
    metrics: dict[str, Metric] = {
        f"code/{status}": Mean.of([float(verdict.status == status) for verdict in every]) for status in STATUSES
    }
    return Scores(scores=[[verdict.score for verdict in row] for row in rows], metrics=metrics)
