"""Code rewards: run the program of a completion on its tests, in the sandbox; the verdict is made here.

Expected values never enter the process that runs the program. A stdin test compares what it printed; an assertion is
taken apart: the child evaluates the calls and sends plain data back, and the comparison happens in this process, so
neither ``__eq__`` tricks, nor ``os._exit(0)``, nor reading files or frames can pass a test.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from rltrain.config import RewardConfig
from rltrain.errors import require
from rltrain.registry import register
from rltrain.rewards.code_tests import Assertion, Unsupported, holds, parse_assertions, undo_plain
from rltrain.rewards.sandbox.pool import Limits
from rltrain.rewards.sandbox.program import ProgramResult, run_program
from rltrain.rewards.verifier.extract import after_thinking
from rltrain.types import Context, Group, Mean, Metric, Scores

CodeStatus = Literal[
    "passed", "wrong", "exception", "timeout", "memory", "output", "no_result", "no_answer", "gold_error", "infra"
]
STATUSES: tuple[CodeStatus, ...] = CodeStatus.__args__  # pyright: ignore[reportAttributeAccessIssue]
MAX_SOURCE_CHARACTERS = 65536

_BLOCK = re.compile(
    r"^```[ \t]*(?:python|py|python3)?[ \t]*\r?\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE | re.IGNORECASE
)


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
    """The program reads ``stdin`` and must print ``stdout``; blanks at line ends and empty last lines are free."""

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
    memory_mib: int = 1024
    output_kib: int = 1024
    workers: int = 2
    max_tests: int = 20

    def __post_init__(self) -> None:
        require(self.kind in ("binary", "continuous"), f"reward.kind={self.kind}: unknown; set binary or continuous")
        require(self.deadline_s > 0, f"reward.deadline_s={self.deadline_s}: must be > 0 seconds")
        require(self.batch_deadline_s > 0, f"reward.batch_deadline_s={self.batch_deadline_s}: must be > 0 seconds")
        require(self.workers >= 1, f"reward.workers={self.workers}: set at least 1")
        require(self.max_tests >= 1, f"reward.max_tests={self.max_tests}: set at least 1")


def extract_code(completion: str) -> str | None:
    """The last closed block after the thinking, or None."""
    text, _ = after_thinking(completion)
    blocks = _BLOCK.findall(text or "")
    return blocks[-1] if blocks and len(blocks[-1]) <= MAX_SOURCE_CHARACTERS else None


def read_tests(answer: str, meta: Mapping[str, Any]) -> list[StdinTest] | list[Assertion]:
    """Tests from ``meta["tests"]``, or from ``answer`` as JSON or source.

    ``{"inputs": […], "outputs": […]}`` for stdin and stdout, or assertions as a list of statements or one source text.
    ``Unsupported`` for tests that this process cannot judge.
    """
    tests = meta.get("tests", answer)
    if isinstance(tests, str):
        with contextlib.suppress(ValueError):
            tests = json.loads(tests)
    if isinstance(tests, Mapping):
        pairs = [StdinTest(stdin=i, stdout=o) for i, o in zip(tests["inputs"], tests["outputs"], strict=True)]
        if not any(test.stdout.strip() for test in pairs):
            raise Unsupported("no test expects any output")
        return pairs
    source = tests if isinstance(tests, str) else "\n".join(tests)
    return parse_assertions(source)


def verify_code(completion: str, answer: str, meta: Mapping[str, Any], config: CodeConfig) -> CodeVerdict:
    """Run the completion's program on every test. Never raises."""
    try:
        tests = read_tests(answer, meta)[: config.max_tests]
    except (Unsupported, SyntaxError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return CodeVerdict(score=None, status="gold_error", passed=0, total=0, reason=f"tests: {error}")
    source = extract_code(completion)
    if source is None:
        return CodeVerdict(score=0.0, status="no_answer", passed=0, total=len(tests), reason="no closed code block")
    results = (
        _run_stdin(source, tests, config) if isinstance(tests[0], StdinTest) else _run_calls(source, tests, config)
    )
    return _verdict(results, len(tests), config.kind)


Result = tuple[CodeStatus, str]


def _verdict(results: Sequence[Result], total: int, kind: str) -> CodeVerdict:
    passed = sum(status == "passed" for status, _ in results)
    status, reason = next((one for one in results if one[0] != "passed"), ("passed", ""))
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
        elif _lines(run.output.decode(errors="replace")) == _lines(test.stdout):
            results.append(("passed", ""))
        else:
            results.append(("wrong", "output differs") if run.output.strip() else ("no_result", "printed nothing"))
        if config.kind == "binary" and results[-1][0] != "passed":
            break
    return results


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _run_calls(source: str, tests: Sequence[Any], config: CodeConfig) -> list[Result]:
    """All assertions in one process; a call that fails ends it, and the tests after it have no result."""
    calls = []
    for test in tests:
        calls += [{"text": text, "statement": True} for text in test.setup]
        calls += [{"text": text, "statement": False} for text in test.calls]
    run = _run(source, config, calls=calls)
    values = _values(run.output)
    results: list[Result] = []
    for test in tests:
        mine, values = values[: len(test.calls)], values[len(test.calls) :]
        if len(mine) < len(test.calls):
            results.append(_fault(run))
        else:
            results.append(("passed", "") if holds(test, mine) else ("wrong", test.text[:200]))
    return results


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
