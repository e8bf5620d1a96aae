"""``rltrain COMMAND …`` is ``python -m rltrain.COMMAND …``; ``rltrain list`` and ``rltrain help`` explain the choices.

rltrain list [experiments | algorithms | estimators | losses | data | rewards | models | rollout engines | environments]
rltrain help [COMMAND | SECTION | KEY | CHOICE | keys]
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from rltrain import cli
from rltrain.errors import ConfigError
from rltrain.options import catalogue
from rltrain.options import help as help_pages

COMMANDS = {
    "train": "train a policy with RL",
    "sft": "supervised fine-tuning, the cold start alone",
    "evaluate": "accuracy on held-out problems",
    "report": "a run's page: curves, credit of every token, warnings",
    "compare": "methods over seeds, with intervals",
    "compare.gradients": "an estimator against the exact gradient, without training",
    "plan": "memory per rank, before anything is started",
    "audit": "a data set before training: references, splits, rewards",
    "pass_rates": "how often the model solves each training problem, for data.pass_rate",
    "compress": "shorter reasoning traces, with a trained compressor",
    "handbook": "behaviours extracted from solutions, and solutions written with them for a cold start",
    "traces": "solutions for a cold start that a teacher writes and the student finds likely",
    "export": "a run's policy as a transformers folder, or on the hub, with a model card",
    "sample": "completions of a prompt, with the probability of each token",
    "new": "an estimator, reward, loss, environment or data set of yours to begin from",
    "report.panels": "a wandb workspace with the report's panels",
}
# Commands whose module is not named like them.
MODULES = {name: f"rltrain.commands.{name}" for name in ("sample", "new", "pass_rates", "handbook")}


def usage() -> str:
    """The commands, a line each."""
    lines = [f"  {name:18s} {summary}" for name, summary in COMMANDS.items()]
    words = [
        "  list               what can be chosen by name",
        "  help               a command, key or choice in words",
    ]
    first = ["", "begin with: rltrain train +experiment=quickstart"]
    return "\n".join(["rltrain COMMAND …", "", *words, *lines, *first])


def show(titles: Sequence[str]) -> str:
    """The lists of these titles, or all."""
    known = [title for title, *_ in catalogue.LISTS]
    title = " ".join(titles)
    if title and title not in known:
        raise ConfigError(f"rltrain list {title}: no such list; choose one of {', '.join(known)}")
    return catalogue.table(only=title or None)


def explain(topics: Sequence[str]) -> str:
    """Help on each topic; the commands where none is given."""
    return "\n\n".join(_explain(topic) for topic in topics) or usage()


def _explain(topic: str) -> str:
    if topic in help_pages.READS:
        return help_pages.command(topic, help_pages.module_doc(MODULES.get(topic, f"rltrain.{topic}")))
    if topic in COMMANDS:
        doc = help_pages.module_doc(MODULES.get(topic, f"rltrain.{topic}"))
        return f"{doc}\n\nits options: rltrain {topic} --help"
    return help_pages.about(topic)


def main() -> None:
    """Run the command that the first argument names; exits with 2 where there is none of that name."""
    command, *rest = [*sys.argv[1:], ""][: len(sys.argv)]
    rest = [argument for argument in rest if argument]
    if command in ("", "-h", "--help"):
        print(usage())
    elif command == "help":
        print(explain(rest))
    elif command == "list":
        print(show(rest))
    elif command not in COMMANDS:
        raise ConfigError(f"rltrain {command}: no such command; choose one of list, help, {', '.join(COMMANDS)}")
    elif command in help_pages.READS and help_pages.wants_help(rest):
        print(explain([command]))
    else:
        sys.argv = [f"rltrain {command}", *rest]
        runpy.run_module(MODULES.get(command, f"rltrain.{command}"), run_name="__main__", alter_sys=True)


def console() -> None:
    """The console script, with errors in one line."""
    with cli.errors_in_one_line():
        main()


if __name__ == "__main__":
    console()
