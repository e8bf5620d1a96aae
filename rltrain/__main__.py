"""``rltrain COMMAND …`` is ``python -m rltrain.COMMAND …``; ``rltrain list`` says what can be chosen by name.

rltrain list [experiments | algorithms | estimators | data | rewards | models | rollout engines]
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from rltrain import cli
from rltrain.errors import ConfigError
from rltrain.options import catalogue

COMMANDS = {
    "train": "train a policy with RL",
    "sft": "supervised fine-tuning, the cold start alone",
    "evaluate": "accuracy on held-out problems",
    "report": "a run's page: curves, credit of every token, warnings",
    "compare": "methods over seeds, with intervals",
    "compare.gradients": "an estimator against the exact gradient, without training",
    "plan": "memory per rank, before anything is started",
    "audit": "a data set before training: references, splits, rewards",
    "compress": "shorter reasoning traces, with a trained compressor",
    "report.panels": "a wandb workspace with the report's panels",
}


def usage() -> str:
    """The commands, a line each."""
    lines = [f"  {name:18s} {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(["rltrain COMMAND …", "", "  list               what can be chosen by name", *lines])


def show(titles: Sequence[str]) -> str:
    """The lists of these titles, or all."""
    known = [title for title, *_ in catalogue.LISTS]
    title = " ".join(titles)
    if title and title not in known:
        raise ConfigError(f"rltrain list {title}: no such list; choose one of {', '.join(known)}")
    return catalogue.table(only=title or None)


def main() -> None:
    """Run the command that the first argument names; exits with 2 where there is none of that name."""
    command, *rest = [*sys.argv[1:], ""][: len(sys.argv)]
    if command in ("", "-h", "--help", "help"):
        print(usage())
        return
    if command == "list":
        print(show([argument for argument in rest if argument]))
        return
    if command not in COMMANDS:
        raise ConfigError(f"rltrain {command}: no such command; choose one of list, {', '.join(COMMANDS)}")
    sys.argv = [f"rltrain {command}", *[argument for argument in rest if argument]]
    runpy.run_module(f"rltrain.{command}", run_name="__main__", alter_sys=True)


def console() -> None:
    """The console script, with errors in one line."""
    with cli.errors_in_one_line():
        main()


if __name__ == "__main__":
    console()
