"""A Python notebook: the model writes cells, ``<python>print(2+3)</python>``, and reads their output.

A reply runs all cells so far in a new sandboxed process (that of the code reward) and shows what the last one printed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from rltrain.environments.tags import ToolConfig, cut
from rltrain.errors import require
from rltrain.registry import register
from rltrain.rewards.sandbox.pool import Limits
from rltrain.rewards.sandbox.program import ProgramResult, run_program
from rltrain.types import Environment, Problem, Reply

OUTPUT_BYTES = 2**18
CAUSES = {"timeout": "TimeoutError: the cell took too long", "memory": "MemoryError", "output": "too much output"}
END = "\x1eend\x1e"  # printed after the last cell: a program that left before has run a part of it

# In the sandbox. Earlier cells run again without their output; what a cell raises ends that cell alone.
_NOTEBOOK = """
import ast, contextlib, io, json, random, sys, traceback

def _run_cell(source, space):
    try:
        tree = ast.parse(source, "cell")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), space)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), space)
            if value is not None:
                print(repr(value))
    except MemoryError:
        raise
    except BaseException as error:
        print("".join(traceback.format_exception_only(error)).strip())
        return False
    return True

random.seed(0)
_cells, _end = json.loads({cells!r})
_space = {{"__name__": "__main__"}}
for _cell in _cells[:-1]:
    with contextlib.redirect_stdout(io.StringIO()):
        _run_cell(_cell, _space)
_right = _run_cell(_cells[-1], _space)
print(_end + str(int(_right)), end="")
"""


@dataclass(kw_only=True)
class PythonConfig(ToolConfig):
    """The value of a cell's last expression is printed as in a notebook; of an exception its last line is shown.

    A cell that was stopped (time, memory, output) is not kept. ``memory_mib`` and ``reply_timeout_s`` bound all cells
    of a reply together. ``network`` must stay false.
    """

    tag: str = "python"  # the model writes <python>…</python>
    reply_format: str = "<output>{}</output>"  # what the model reads; {} is the output
    output_characters: int = 400  # of an output that are shown; the mark behind them says how many more there were

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.network, "environment.network=true: programs of a model have no network; set it to false")
        require(self.output_characters >= 1, f"environment.output_characters={self.output_characters}: set at least 1")

    def replies_here(self) -> bool:
        return True


@register("environment", "python", PythonConfig)
class Notebook(Environment):
    """The state is the list of cells so far. ``random`` is seeded; time and the machine are no part of the state."""

    def __init__(self, config: PythonConfig) -> None:
        self.config = config
        self.stop, self.role = (config.closing,), config.role

    def start(self, problem: Problem) -> list[str]:
        return []

    def respond(self, state: Any, text: str) -> Reply:
        cell = self.config.call_in(text)
        if cell is None:
            return Reply(text="", state=state, done=True)
        cells = [*state, cell.strip("\n")]
        run = self._run(cells)
        output, right = _outcome(run)
        if run.status == "infra":
            return Reply(text=self.config.told("the sandbox did not start"), state=state, called=True, failure="error")
        shown = self.config.shown(cut(output.rstrip("\n"), self.config.output_characters))
        kept = cells if right is not None else state
        return Reply(text=shown, state=kept, called=True, reward=self.config.call_reward if right else 0.0)

    def _run(self, cells: list[str]) -> ProgramResult:
        config = self.config
        return run_program(
            _NOTEBOOK.format(cells=json.dumps([cells, END])),
            deadline_s=config.reply_timeout_s,
            output_bytes=OUTPUT_BYTES,
            limits=Limits(memory_mib=config.memory_mib, cpu_s=int(config.reply_timeout_s) + 1),
        )

    def key(self, state: Any) -> str:
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


def _outcome(run: ProgramResult) -> tuple[str, bool | None]:
    """What the last cell printed, and whether it ended without an exception; None: it did not end."""
    printed, found, right = run.output.decode("utf-8", "replace").rpartition(END)
    if found and run.status in ("ok", "exception"):
        return printed, right == "1"
    cause = CAUSES.get(run.status, f"the process ended (exit code {run.exit_code})")
    return f"{right.rstrip()}\n{cause}".lstrip("\n"), None
