"""Run rltrain's commands one after the other, each in a fork of a process that has imported everything.

python scripts/reproduce/several.py < LINES

A line is ``RESULT COMMAND WORD…``, in the shell's quotes. A line whose file or folder RESULT exists is done, so the
same lines go on where they stopped. A command that ends well and does not write RESULT gets an empty file there. The
first command that fails ends the rest, with its exit code.
"""

from __future__ import annotations

import importlib
import os
import runpy
import shlex
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from rltrain.__main__ import COMMANDS, MODULES

# The slow imports.
IMPORTED = ("rltrain.trainer", "trl.trainer.sft_trainer", "accelerate", "deepspeed", "torch._dynamo")
IMPORTED += ("transformers.models.qwen3.modeling_qwen3", "transformers.models.llama.modeling_llama", "pyarrow.parquet")
IMPORTED += ("matplotlib.backends.backend_agg", "matplotlib.pyplot", "scipy.stats", "scipy.optimize")


def run(words: Sequence[str]) -> int:
    """The exit code of one command, run in a fork."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _exit_code(words)
        except BaseException:  # a fork must never go on with the parent's lines
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        os.kill(child, signal.SIGTERM)  # a run saves its step
        os.waitpid(child, 0)
        raise


def _exit_code(words: Sequence[str]) -> int:
    command, *rest = words
    sys.argv = [f"rltrain {command}", *rest]
    try:
        runpy.run_module(MODULES.get(command, f"rltrain.{command}"), run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def main(lines: Sequence[str]) -> int:
    """Run the lines that are not done; 0, or the exit code of the first that fails."""
    asked = [shlex.split(line) for line in lines if line.strip()]
    for result, command, *_ in asked:
        if command not in COMMANDS:
            sys.exit(f"{result}: {command} is no command of rltrain; choose one of {', '.join(COMMANDS)}")
    waiting = [words for words in asked if not Path(words[0]).exists()]
    if waiting:
        import_once()
    for number, (result, *words) in enumerate(waiting, start=len(asked) - len(waiting) + 1):
        start_s = time.monotonic()
        code = run(words)
        print(f"{number}/{len(asked)}  {result}  {time.monotonic() - start_s:.0f} s  exit {code}", flush=True)
        if code:
            return code
        if not Path(result).exists():
            Path(result).touch()
    return 0


def import_once() -> None:
    """Everything that a command imports, so that a forked one does not."""
    for name in IMPORTED:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    warnings.filterwarnings("ignore", "'rltrain", RuntimeWarning)  # runpy's, of a command that is imported already
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1"}
    sys.exit(main(sys.stdin.read().splitlines()))
