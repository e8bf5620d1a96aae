"""Every config key with its type, default and description, read from the dataclasses' source without importing it.

A key's description is the comment behind its field, the comment above it, or the sentences of its class's docstring
that name it in double backquotes.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from rltrain.options import catalogue
from rltrain.options.keys import ANY, FIRST, pattern

ROOT_CLASS = "RunConfig"


@dataclass(frozen=True, kw_only=True)
class ConfigField:
    """A field of a config dataclass as its source has it. ``text`` is empty where nothing describes it."""

    name: str
    annotation: str
    default: str
    text: str


@dataclass(frozen=True, kw_only=True)
class ConfigClass:
    """A config dataclass as its source has it, with the names of its bases."""

    name: str
    bases: tuple[str, ...]
    doc: str
    fields: Mapping[str, ConfigField]


@dataclass(frozen=True, kw_only=True)
class DescribedKey:
    """A key by its dotted path, and the choices it belongs to (``rollout=vllm``); none where it always exists."""

    path: str
    annotation: str
    default: str
    text: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A dataclass of keys at a path, with what its docstring says."""

    path: str
    name: str
    doc: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Described:
    """All sections and keys, in the order of the dataclasses."""

    sections: list[Section] = field(default_factory=list)
    keys: dict[str, DescribedKey] = field(default_factory=dict)

    def is_open(self, path: str) -> bool:
        """Whether the key at a path is a mapping from any name."""
        key = self.keys.get(pattern(path))
        return key is not None and key.annotation.startswith("dict[")


@functools.cache
def classes() -> dict[str, ConfigClass]:
    """The config dataclasses of the package by name."""
    found = {}
    for path in sorted(catalogue.PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if re.search(r"^class \w+Config\b", text, re.M):
            lines = text.splitlines()
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                    found[node.name] = _class(node, lines)
    return found


def _class(node: ast.ClassDef, lines: list[str]) -> ConfigClass:
    doc = ast.get_docstring(node) or ""
    entries = [each for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)]
    return ConfigClass(
        name=node.name,
        bases=tuple(ast.unparse(base) for base in node.bases),
        doc=doc,
        fields={entry.target.id: _field(entry, lines, doc) for entry in entries},  # type: ignore[union-attr]
    )


def _field(entry: ast.AnnAssign, lines: list[str], doc: str) -> ConfigField:
    name = ast.unparse(entry.target)
    return ConfigField(
        name=name,
        annotation=ast.unparse(entry.annotation),
        default=_default(entry.value),
        text=_behind(entry, lines) or _above(entry, lines) or _in_docstring(name, doc),
    )


def _default(value: ast.expr | None) -> str:
    """The default as a command line writes it; empty where there is none."""
    if value is None or (isinstance(value, ast.Name) and value.id == "MISSING"):
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        factory = next((word.value for word in value.keywords if word.arg == "default_factory"), None)
        if isinstance(factory, ast.Lambda):
            return ast.unparse(factory.body)
        return {"list": "[]", "dict": "{}"}.get(ast.unparse(factory) if factory else "", "")
    if isinstance(value, ast.Constant) and not isinstance(value.value, str):
        return {"None": "null", "True": "true", "False": "false"}.get(str(value.value), str(value.value))
    if isinstance(value, ast.Constant) and value.value and not re.search(r"\s", str(value.value)):
        return str(value.value)
    return ast.unparse(value)


def _behind(entry: ast.AnnAssign, lines: list[str]) -> str:
    assert entry.end_lineno is not None and entry.end_col_offset is not None
    rest = lines[entry.end_lineno - 1].encode()[entry.end_col_offset :].decode()
    return re.sub(r"#\s*(noqa|type:)\S*.*", "", rest).partition("#")[2].strip()


def _above(entry: ast.AnnAssign, lines: list[str]) -> str:
    comments: list[str] = []
    for line in reversed(lines[: entry.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        comments.insert(0, line.strip().lstrip("# "))
    return " ".join(comments)


def _in_docstring(name: str, doc: str) -> str:
    sentences = re.split(r"(?<=[.;])\s+(?=[A-Z`])", " ".join(doc.split()))
    return plain(" ".join(sentence for sentence in sentences if f"``{name}" in sentence))


def plain(text: str) -> str:
    """A docstring's text without its marks."""
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text).replace("``", "")


@functools.cache
def described() -> Described:
    """All sections and keys of a run's config, and of every part that can be chosen."""
    found = Described()
    for entry in _walk(ROOT_CLASS, "", ()):
        if isinstance(entry, Section):
            found.sections.append(entry)
        elif (before := found.keys.get(entry.path)) is None:
            found.keys[entry.path] = entry
        elif before.choices:
            found.keys[entry.path] = replace(before, choices=(*before.choices, *entry.choices))
    return found


def _walk(
    name: str, prefix: str, choices: tuple[str, ...], inside: tuple[str, ...] = ()
) -> Iterator[Section | DescribedKey]:
    """The section ``name`` at ``prefix``, its keys, and those of the parts that can be chosen for it.

    Of a part ``inside`` of parts of the same kind, as data sets in one, only the keys that all have.
    """
    owner = classes()[name]
    yield Section(path=prefix.removesuffix("."), name=name, doc=owner.doc, choices=choices)
    for entry in all_fields(name).values():
        hint, path = _inner(entry.annotation), f"{prefix}{entry.name}"
        if hint in classes() and entry.annotation.startswith("dict["):
            path = f"{path}.{ANY}"
        if hint not in classes():
            yield DescribedKey(
                path=path, annotation=entry.annotation, default=entry.default, text=entry.text, choices=choices
            )
            continue
        yield from _walk(hint, f"{path}.", choices, inside)
        for group, part, config in registered():
            if config != hint and hint in ancestors(config) and hint not in inside:
                chosen = group if path == group else f"{group}@{path.replace(ANY, FIRST)}"
                yield from _walk(config, f"{path}.", (f"{chosen}={part}",), (*inside, hint))


def _inner(annotation: str) -> str:
    """``X`` of ``X``, ``X | None`` and ``dict[str, X]``."""
    bare = annotation.removesuffix(" | None")
    found = re.fullmatch(r"dict\[str, (\w+)\]", bare)
    return found[1] if found else bare


def all_fields(name: str) -> dict[str, ConfigField]:
    """The fields of a class, those of its bases first, as dataclasses order them."""
    found: dict[str, ConfigField] = {}
    for each in reversed(ancestors(name)):
        found |= classes()[each].fields
    return found


def ancestors(name: str) -> list[str]:
    """The class and its bases among the config dataclasses, nearest first."""
    found = [name]
    for base in classes()[name].bases:
        found += ancestors(base) if base in classes() else []
    return found


@functools.cache
def registered() -> list[tuple[str, str, str]]:
    """``(group, name, config class)`` of every part that a file of the package registers."""
    return sorted(
        (group, name, config) for group in catalogue.PACKAGES for name, config in catalogue.configs_of(group).items()
    )
