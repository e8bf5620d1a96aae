"""Every command of README and the pages is composed here, run by a named test, or listed as not run with the reason."""

import re
import shlex
from pathlib import Path

import pytest

from rltrain import cli
from rltrain.commands import handbook, new, sample
from rltrain.errors import ConfigError
from rltrain.options.help import READS

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "slurm/README.md"]
PROGRAM = re.compile(r"(python|rltrain|make|torchrun|sbatch|srun|bash|vllm|lm_eval) |scripts/|\.venv/bin/")
# Commands that no test runs, by how they begin, and why. What they name is checked by tests/docs/test_docs.py.
NOT_RUN = {
    "make": "targets of the Makefile; CI runs test, check and docs",
    "bash": "reproductions and sweeps of hours, and .ci/run, which runs this test",
    "scripts/": "reproductions and sweeps of hours",
    "python scripts/": "benchmarks and tools; those of make bench run there",
    "sbatch": "needs Slurm; tests/runs/test_slurm.py runs the scripts where it is installed",
    "srun": "needs Slurm",
    "torchrun": "several ranks; tests/runs/test_ranks.py runs the same entry point",
    "vllm": "needs vLLM; make test-vllm",
    "lm_eval": "needs the package lm-eval; its problems are checked in tests/docs/test_notebooks.py",
    "python -m pytest": "is a test itself",
    "python -m pip": "installs",
    "python -m http": "a server for a person",
    "python -m rltrain.report": "tests/unit/report and tests/runs/test_report_browser.py run it",
    "python -m rltrain.compare": "tests/unit/compare runs it",
    "python -m rltrain.export": "tests/runs run it",
    "python -m pre_commit": "installs a hook",
    "python -m mkdocs": "tests/docs/test_docs.py builds the site",
}
OPEN = re.compile(r"…|\bFOLDER\b|\bCOMPRESSOR\b|\bRUN\b|my_|import_path|\$|KEY=|=VALUE|\[key=value|path=PATH|BY_HAND")


def commands(text: str) -> list[str]:
    """The command lines of a page's blocks, without comments and prompts."""
    fenced = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.DOTALL)
    indented = re.findall(r"(?m)^    .*(?:\\\n.*)*$", text)
    lines = "\n".join([*fenced, *indented]).replace("\\\n", " ").splitlines()
    plain = [re.sub(r"\s+#.*$", "", re.sub(r"^(\w+=\S+ )+", "", line.strip().removeprefix("$ "))) for line in lines]
    return [line.replace(".venv/bin/", "") for line in plain if PROGRAM.match(line)]


COMMANDS = sorted({(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in commands(page.read_text())})


def words_of(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return line.split()


def kind(line: str) -> str:
    """``config``, ``words`` (a command of rltrain's own), the reason why it is not run, or nothing."""
    words = words_of(line)
    if words[:2] == ["python", "-m"] and words[2].startswith("rltrain."):
        words = ["rltrain", words[2].removeprefix("rltrain.").removeprefix("commands."), *words[3:]]
    if words[0] == "rltrain":
        if words[1] in READS:
            return "config"
        if words[1] in ("list", "help", "sample", "new"):
            return "words"
        line = f"python -m rltrain.{words[1]}"
    return next((reason for start, reason in NOT_RUN.items() if line.startswith(start)), "")


def test_every_command_is_run_or_listed_with_a_reason():
    assert [f"{page}: {line}" for page, line in COMMANDS if not kind(line)] == []
    assert len(COMMANDS) > 100


def arguments(line: str) -> list[str]:
    words = words_of(line)
    return words[2:] if words[0] == "rltrain" else words[3:]


def is_composed(line: str) -> bool:
    """The commands of ``-m rltrain.train`` are composed in tests/docs/test_docs.py."""
    closed = not OPEN.search(line) and "--" not in line and "-m rltrain.train " not in line
    return closed and kind(line) == "config"


COMPOSED = sorted({line for _, line in COMMANDS if is_composed(line)})


@pytest.mark.parametrize("line", COMPOSED)
def test_a_command_with_a_config_composes(line):
    own = ("device=", "nodes=", "gpus_per_node=", "gpu_gib=", "prompt_tokens=", "new_tokens=")  # the planner's
    words = [word.replace("=NAME", "=quickstart") for word in arguments(line) if not word.startswith(own)]
    cli.compose([word for word in words if word not in ("-v", ">", "|", *handbook.ACTIONS)])


@pytest.mark.parametrize("line", sorted({line for _, line in COMMANDS if kind(line) == "words"}))
def test_a_command_of_words_is_understood(line):
    from rltrain.__main__ import explain, show

    words = words_of(line)
    words = words[1:] if words[0] == "rltrain" else [words[2].rpartition(".")[2], *words[3:]]
    name, *rest = [word for word in words if word not in ("|",)]
    if any(word.isupper() or "|" in word for word in rest[:1]):
        return  # a pattern, not a command
    try:
        {"list": show, "help": explain, "sample": sample.parser().parse_args, "new": new.parser().parse_args}[name](
            rest
        )
    except (ConfigError, SystemExit) as error:
        pytest.fail(f"{line}: {error}")


def test_commands_are_seen():
    text = "```bash\npython -m rltrain.train a=1 \\\n  b=2  # why\n```\n\n    A=1 rltrain list\n"
    assert commands(text) == ["python -m rltrain.train a=1    b=2", "rltrain list"]
