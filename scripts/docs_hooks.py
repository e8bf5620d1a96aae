"""Hooks of the docs site: MathJax, includes of other files, links to sources, roles that only Sphinx reads."""

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
MENTION = re.compile(r"(?<![\[`])`((?:rltrain|scripts|configs|slurm)/[\w./-]+\.\w+)`(?![\]`])")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)[^)]*\)")
TARGET = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)")
INCLUDE = re.compile(r"^<!-- include (\S+?)(?:: (.+))? -->$", re.MULTILINE)
ROLE = re.compile(r":(?:func|mod|class|meth|data):(?=<code>)")


# The kinds of files that pages link to, and their languages.
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".sbatch": "bash", ".toml": "toml", ".json": "json"}


def on_config(config: Any, **_: object) -> Any:
    """Pages that the navigation does not place come last in it."""
    docs = Path(config["docs_dir"])
    rest = {str(page.relative_to(docs)) for page in docs.rglob("*.md")} - set(listed(config["nav"]))
    if rest:
        config["nav"].append({"More": sorted(rest)})
    return config


def on_files(files: Any, *, config: Any, **_: object) -> Any:
    """MathJax and its licence become files of the site, so that formulas need no network."""
    from mkdocs.structure.files import File, InclusionLevel

    package = importlib.util.find_spec("mathjax")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("no package mathjax; pip install '.[docs]' brings it (make docs)")
    source = Path(next(iter(package.submodule_search_locations))) / "static/mathjax"
    for name, path in (("tex-svg.js", source / "es5/tex-svg.js"), ("LICENSE", source / "LICENSE")):
        files.append(File.generated(config, f"mathjax/{name}", abs_src_path=str(path)))
    docs = Path(config["docs_dir"])
    for path in sorted(linked_sources(docs)):
        code = (docs.parent / path).read_text(encoding="utf-8")
        text = f"---\nhide: [navigation, toc]\n---\n\n# {path}\n\n````{LANGUAGES[path.suffix]}\n{code}\n````\n"
        files.append(
            File.generated(config, page_of(path).as_posix(), content=text, inclusion=InclusionLevel.NOT_IN_NAV)
        )
    return files


def linked_sources(docs: Path) -> set[Path]:
    """The files outside ``docs`` that pages link to or mention in code, by their paths in the checkout."""
    pages = [*docs.rglob("*.md"), *whole_includes(docs), docs.parent / "README.md"]
    found: set[Path] = set()
    for page in pages:
        text = FENCED.sub("", page.read_text(encoding="utf-8"))
        found |= {(page.parent / target).resolve() for _, target in LINK.findall(text)}
        found |= {docs.parent.resolve() / target for target in MENTION.findall(text)}
    return {path.relative_to(docs.parent.resolve()) for path in found if is_source(path, docs)}


def is_source(path: Path, docs: Path) -> bool:
    """Whether the site shows this file as a page of code."""
    return path.suffix in LANGUAGES and path.is_file() and docs.parent.resolve() in path.parents


def page_of(path: Path) -> Path:
    """The page of the site that holds a file of the checkout."""
    return Path("source", f"{path.as_posix()}.md")


def listed(entry: Any) -> list[str]:
    """The pages of an entry of the navigation."""
    if isinstance(entry, str):
        return [entry]
    return [page for one in (entry.values() if isinstance(entry, dict) else entry) for page in listed(one)]


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: object) -> str:
    """Includes are filled in. Links out of ``docs`` lead to the page of that file, or become text.

    A path of the checkout in code becomes a link, too.
    """
    docs = Path(config["docs_dir"])
    folder = (docs / page.file.src_uri).parent
    pages = whole_includes(docs)

    def included(found: re.Match[str]) -> str:
        source = docs.parent / found[1]
        return relinked(chosen(source.read_text(encoding="utf-8"), found[2]), source.parent, folder)

    def text_or_link(found: re.Match[str]) -> str:
        target = (folder / found[2]).resolve()
        if target in pages:
            return found[0].replace(found[2], Path(os.path.relpath(pages[target], folder)).as_posix())
        if is_source(target, docs):
            return f"[{found[1]}]({source_link(target.relative_to(docs.parent.resolve()))})"
        return found[1] if target.exists() and docs not in target.parents else found[0]

    def source_link(path: Path) -> str:
        return Path(os.path.relpath(docs / page_of(path), folder)).as_posix()

    def mentioned(found: re.Match[str]) -> str:
        is_shown = is_source(docs.parent.resolve() / found[1], docs)
        return f"[{found[0]}]({source_link(Path(found[1]))})" if is_shown else found[0]

    def linked(text: str) -> str:
        return MENTION.sub(mentioned, LINK.sub(text_or_link, text))

    if Path(page.file.src_uri).parts[0] == "source":
        return markdown
    text, pieces, end = INCLUDE.sub(included, markdown), [], 0
    for fence in FENCED.finditer(text):
        pieces += [linked(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, linked(text[end:])])


def whole_includes(docs: Path) -> dict[Path, Path]:
    """The files that a page includes as they are, and those pages."""
    found = [(INCLUDE.search(page.read_text(encoding="utf-8")), page) for page in docs.rglob("*.md")]
    return {(docs.parent / match[1]).resolve(): page for match, page in found if match and match[2] is None}


def chosen(text: str, headings: str | None) -> str:
    """The sections under the named headings (``A, B``), each up to the next heading of level 1 or 2; None: all."""
    if headings is None:
        return text
    by_heading = dict(sections(text))
    return "\n".join(by_heading[heading] for heading in headings.split(", "))


def sections(text: str) -> Iterator[tuple[str, str]]:
    """Heading and text, heading included, of each section; a ``#`` in a fenced block is no heading."""
    heading, lines, fenced = "", list[str](), False
    for line in text.split("\n"):
        fenced ^= line.startswith("```")
        if not fenced and re.match(r"##? ", line):
            yield heading, "\n".join(lines)
            heading, lines = line.lstrip("# "), []
        lines.append(line)
    yield heading, "\n".join(lines)


def relinked(text: str, source: Path, folder: Path) -> str:
    """The text with its relative links, which start from ``source``, as links from ``folder``."""

    def moved(found: re.Match[str]) -> str:
        return found[1] + Path(os.path.relpath((source / found[2]).resolve(), folder)).as_posix()

    return TARGET.sub(moved, text)


def on_page_content(html: str, **_: object) -> str:
    """Roles such as ``:func:`` before a name go."""
    return ROLE.sub("", html)
