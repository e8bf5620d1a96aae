"""Help in words: for a command, a section of keys, a key, or a choice. Read from the files, without importing them."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator, Sequence

from rltrain.errors import ConfigError
from rltrain.options import catalogue, keys
from rltrain.options.described import (
    ROOT_CLASS,
    ConfigField,
    DescribedKey,
    Section,
    all_fields,
    classes,
    described,
    plain,
    registered,
)

WIDTH = 100
# The commands that compose a config, and the sections of keys that each of them reads, beside the keys of no section.
READS = {
    "train": "model data eval_data cold_start_data rewards eval_rewards advantage loss rollout environment sampling "
    "batch scorer optimizer deepspeed evaluation checkpoint tracking cold_start watchdog debug",
    "sft": "model data cold_start_data cold_start tracking watchdog",
    "evaluate": "model data eval_data rewards eval_rewards rollout environment sampling scorer evaluation tracking "
    "watchdog",
    "compress": "model data rollout sampling scorer compress tracking watchdog",
    "traces": "model data rewards rollout sampling traces tracking watchdog",
    "handbook": "model data rewards rollout sampling scorer handbook tracking watchdog",
    "pass_rates": "model data rewards rollout environment sampling scorer tracking watchdog",
    "plan": "model rollout sampling batch scorer loss optimizer deepspeed",
    "audit": "model data rewards sampling audit",
}
FLAGS = (
    ("-v", "show the warnings of libraries, too (tracking.verbose=true)"),
    ("--config-dir FOLDER", "a folder of YAML of yours beside configs/"),
    ("--cfg job", "print the composed config instead of running"),
    ("--multirun key=A,B", "one run after the other for each value"),
    ("--shell-completion install=bash", "completion of keys and choices (docs/quickstart.md)"),
    ("--hydra-help", "what else Hydra takes"),
)


def command(name: str, usage: str) -> str:
    """What a command that composes a config does, what can be chosen, which sections of keys it reads."""
    choices = [_one_line(how.replace("NAME", ""), _names(folder, group)) for _, how, folder, group in catalogue.LISTS]
    single = ", ".join(key.path for key in described().keys.values() if "." not in key.path)
    sections = [_row(path, all_fields(ROOT_CLASS)[path].text) for path in READS[name].split()]
    blocks = [
        usage,
        "\n".join(["choices, with a line each: rltrain list", *choices]),
        "\n".join(["keys, in words: rltrain help SECTION | KEY; all of them: rltrain help keys", f"  {single}"]),
        "\n".join(sections),
        "\n".join(["flags", *(_row(flag, text, 33) for flag, text in FLAGS)]),
    ]
    return "\n\n".join(blocks)


def _names(folder: str | None, group: str | None) -> str:
    return ", ".join(choice.name for choice in catalogue.choices(folder, group))


def _row(left: str, text: str, width: int = 23) -> str:
    gap = " " * (width + 4)
    lines = textwrap.wrap(text, WIDTH - width, break_on_hyphens=False) or [""]
    return f"  {left:{width}s}  " + f"\n{gap}".join(lines) if len(lines) < 3 else _row(left, _cut(text, width), width)


def _one_line(left: str, text: str) -> str:
    return f"  {left:23s}  {textwrap.shorten(text, WIDTH - 23, placeholder=' …')}"


def _cut(text: str, width: int) -> str:
    return textwrap.shorten(text, 2 * (WIDTH - width) - 12, placeholder=" …")


def module_doc(module: str) -> str:
    """The docstring of a module of the package, by its dotted name, without importing it."""
    stem = catalogue.PACKAGE.joinpath(*module.split(".")[1:])
    path = stem / "__main__.py" if stem.is_dir() else stem.with_suffix(".py")
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def about(topic: str) -> str:
    """Help on ``keys``, a section, a key, or a choice (``advantage=spae``, ``spae``); ConfigError on anything else."""
    if topic == "keys":
        return "\n".join(_line(key) for key in described().keys.values() if not key.choices) + (
            "\n\nkeys of a choice: rltrain help data=hub, for example"
        )
    found = [*_of_choice(topic), *_of_section(topic), *_of_key(topic)]
    if not found:
        near = keys.nearest(topic, described().keys)
        meant = f"did you mean {near}?" if near else "rltrain help keys lists the keys, rltrain list the choices"
        raise ConfigError(f"rltrain help {topic}: no such command, section, key or choice; {meant}")
    return "\n\n".join(found)


def _line(key: DescribedKey | ConfigField, name: str | None = None) -> str:
    """A key with its default and what it is."""
    path = name or (key.path if isinstance(key, DescribedKey) else key.name)
    shown = path if not key.default else f"{path}={key.default}"
    return _row(shown if len(shown) <= 40 else f"{path}=…", key.text, 41)


def _of_section(topic: str) -> Iterator[str]:
    """The section at a path: what it is, its choices, the keys that it has under every choice."""
    path = {"reward": "rewards.*", "rewards": "rewards.*", "eval_rewards": "eval_rewards.*"}.get(topic, topic)
    for section in described().sections:
        if section.path == path and path and not section.choices:
            below = [key for key in described().keys.values() if key.path.startswith(f"{path}.") and not key.choices]
            yield "\n".join([_title(path, section), *(_line(key) for key in below), *_choices_of(section)])


def _title(path: str, section: Section) -> str:
    return f"{path}\n{textwrap.indent(plain(section.doc), '  ')}\n"


def _choices_of(section: Section) -> list[str]:
    """How the parts of a section are chosen."""
    of_parts = [other.choices[0] for other in described().sections if other.choices and other.path == section.path]
    if not of_parts:
        return []
    chosen = of_parts[0].partition("=")[0]
    names = ", ".join(sorted(part.partition("=")[2] for part in of_parts))
    group = chosen.partition("@")[0]
    return ["", _row(f"{chosen}=…", names, 41), f"  the keys of each: rltrain help {group}=…"]


def _of_key(topic: str) -> Iterator[str]:
    path = keys.pattern(topic)
    if (key := described().keys.get(path)) is not None:
        default = key.default or "none, it must be set"
        lines = [f"{topic}   {key.annotation}, default {default}", *textwrap.wrap(key.text, WIDTH)]
        if key.choices:
            lines += textwrap.wrap(f"belongs to {', '.join(key.choices)}", WIDTH)
        owner = topic.rpartition(".")[0]
        yield "\n  ".join([*lines, *([f"more of its section: rltrain help {owner}"] if owner else [])])


def _of_choice(topic: str) -> Iterator[str]:
    """The part or the preset of a name: what it is and its keys, or its YAML."""
    group, _, name = topic.rpartition("=")
    group = group.lstrip("+").partition("@")[0]
    for part_group, part, config in registered():
        if part == name and group in ("", part_group):
            summary = next(choice.summary for choice in catalogue.registered(part_group) if choice.name == part)
            doc = plain(classes()[config].doc)
            entries = [_line(entry) for entry in all_fields(config).values() if entry.annotation not in classes()]
            yield "\n".join([f"{part_group}={part}   {summary}", textwrap.indent(doc, "  "), "", *entries])
    for folder in sorted(path.name for path in catalogue.config_folder().iterdir() if path.is_dir()):
        path = catalogue.config_folder() / folder / f"{name}.yaml"
        if group in ("", folder) and name and path.is_file():
            mark = "+" if folder == "experiment" else ""
            yield f"{mark}{folder}={name}\n{textwrap.indent(path.read_text(encoding='utf-8').rstrip(), '  ')}"


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return bool({"--help", "-h"} & set(arguments))
