"""Runs a program in a separate process tree, with a deadline and limits."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rltrain.rewards.sandbox.pool import START_DEADLINE_S, Limits, describe, end_child, exchange, start_child

log = logging.getLogger("rltrain.sandbox")

ProgramStatus = Literal["ok", "exception", "timeout", "memory", "output", "infra"]


_EXIT_MEMORY = 86


@dataclass(frozen=True, kw_only=True)
class ProgramResult:
    """How a program ended, and what it wrote (at most the cap). ``ok`` means exit code 0, which proves nothing."""

    status: ProgramStatus
    output: bytes
    exit_code: int | None
    protections: tuple[str, ...] = ()


def run_program(
    source: str,
    *,
    stdin: str = "",
    calls: Sequence[dict[str, Any]] | None = None,
    deadline_s: float = 5.0,
    output_bytes: int = 2**20,
    limits: Limits | None = None,
) -> ProgramResult:
    """Run Python ``source`` in a new process tree, all of whose processes have ended on return. Never raises.

    The program reads ``stdin``. With ``calls`` its output is discarded, and ``output`` holds a JSON line for each
    evaluated call instead. ``deadline_s`` counts from the start of the program.
    """
    request = json.dumps({"source": source, "stdin": stdin, "calls": calls}).encode() + b"\n"
    root = tempfile.mkdtemp(prefix="rltrain-")
    try:
        Path(root).chmod(0o777)
        child = start_child("program", asdict(limits or Limits()) | {"root": root})
        return _watch(child, request, deadline_s, output_bytes)
    except Exception as error:
        log.warning("sandbox: a program could not be run: %s: %s", type(error).__name__, error)
        return ProgramResult(status="infra", output=b"", exit_code=None)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _watch(child: subprocess.Popen[bytes], request: bytes, deadline_s: float, output_bytes: int) -> ProgramResult:
    start_deadline = time.monotonic() + START_DEADLINE_S
    head, state = exchange(child, request, start_deadline, limit=output_bytes, one_line=True)
    if state in ("end", "timeout"):
        return ProgramResult(status="infra", output=b"", exit_code=end_child(child))
    header, _, output = head.partition(b"\n")
    active = tuple(json.loads(header)["active"])
    describe("programs", active)
    if state == "ok":
        rest, state = exchange(child, b"", time.monotonic() + deadline_s, limit=output_bytes, one_line=False)
        output += rest
    if state == "end":
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(1.0)
    code = end_child(child)
    return ProgramResult(status=_run_status(state, code), output=output, exit_code=code, protections=active)


def _run_status(state: str, code: int) -> ProgramStatus:
    if state in ("timeout", "output"):
        return state
    if code in (128 + signal.SIGXCPU, 128 + signal.SIGKILL, -signal.SIGXCPU):
        return "timeout"
    if code in (_EXIT_MEMORY, 128 + signal.SIGSEGV, 128 + signal.SIGABRT):
        return "memory"
    return "ok" if code == 0 else "exception"
