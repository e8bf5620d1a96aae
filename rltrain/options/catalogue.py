"""What can be chosen by name, each with its first sentence, read from the files themselves without importing them."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Title of a list, how its entries are chosen, and where they come from: a folder of YAML, a group of parts, or both.
LISTS = (
    ("experiments", "+experiment=NAME", "experiment", None),
    ("algorithms", "algorithm=NAME", "algorithm", None),
    ("estimators", "advantage=NAME", None, "advantage"),
    ("losses", "loss=NAME", None, "loss"),
    ("data", "data=NAME", "data", "data"),
    ("rewards", "reward@rewards.answer=NAME", "reward", "reward"),
    ("models", "model=NAME", "model", "model"),
    ("rollout engines", "rollout=NAME", None, "rollout"),
    ("environments", "environment=NAME", "environment", "environment"),
)
PACKAGES = {
    "model": "policy",
    "advantage": "advantages",
    "loss": "losses",
    "reward": "rewards",
    "data": "data",
    "rollout": "rollout",
    "environment": "environments",
}
WIDTH = 120
PACKAGE = Path(__file__).parents[1]


def config_folder() -> Path:
    """The YAML folder: inside an installed wheel, beside the package in a checkout."""
    packaged = PACKAGE / "configs"
    return packaged if packaged.is_dir() else PACKAGE.parent / "configs"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A name and the first sentence of what describes it."""

    name: str
    summary: str


def choices(folder: str | None, group: str | None) -> list[Choice]:
    """The presets of a folder of ``configs/`` and the registered parts of a group, by name."""
    found = [*presets(folder)] if folder else []
    return sorted([*found, *(registered(group) if group else [])], key=lambda choice: choice.name)


def presets(folder: str) -> Iterator[Choice]:
    """The YAML files of ``configs/<folder>``, described by the comment at their head."""
    for path in (config_folder() / folder).glob("*.yaml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        head = [line.removeprefix("# ") for line in lines if line.startswith("# ") and "@package" not in line]
        yield Choice(name=path.stem, summary=first_sentence(" ".join(head)))


def registered(group: str) -> Iterator[Choice]:
    """The parts that files of the package register under ``group``.

    A file's docstring describes its only part; of several each is described by its own.
    """
    for module, named in _registrations(group):
        for name, _, node in named:
            described = module if len(named) == 1 else node
            yield Choice(name=name, summary=first_sentence(ast.get_docstring(described) or ""))


def configs_of(group: str) -> dict[str, str]:
    """The name of the config class of each part registered under ``group``."""
    return {name: config for _, named in _registrations(group) for name, config, _ in named}


def _registrations(group: str) -> Iterator[tuple[ast.Module, list[tuple[str, str, ast.FunctionDef | ast.ClassDef]]]]:
    """By file what ``@register(group, name, config, …)`` says, with the definition under it."""
    for path in sorted((PACKAGE / PACKAGES[group]).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if f'@register("{group}", ' in text:
            module = ast.parse(text)
            definitions = [node for node in module.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
            yield module, [(*said, node) for node in definitions if (said := _registered(node, group))]


def _registered(node: ast.FunctionDef | ast.ClassDef, group: str) -> tuple[str, str] | None:
    """Name and config class given by ``@register(group, name, config, …)``, if a definition has it."""
    for call in node.decorator_list:
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register":
            values = [argument.value for argument in call.args[:2] if isinstance(argument, ast.Constant)]
            if len(values) == 2 and values[0] == group:
                return str(values[1]), ast.unparse(call.args[2])
    return None


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence, in plain text."""
    plain = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", " ".join(text.split())).replace("``", "")
    return re.split(r"(?<=[.!?])\s+(?=[A-Z0-9])", plain, maxsplit=1)[0]


def table(*, only: str | None = None) -> str:
    """Every list (or the one of that title) as text of 120 columns."""
    blocks = []
    for title, how, folder, group in LISTS:
        if only in (None, title):
            entries = choices(folder, group)
            widest = max(len(choice.name) for choice in entries)
            blocks.append("\n".join([f"{title}   {how}", *(_line(choice, widest) for choice in entries)]))
    return "\n\n".join(blocks)


def _line(choice: Choice, widest: int) -> str:
    summary = textwrap.shorten(choice.summary, WIDTH - widest - 4, placeholder=" …")
    return f"  {choice.name:{widest}s}  {summary}".rstrip()
