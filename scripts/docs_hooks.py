"""Hooks of the docs site: what reads well in the repository, and what docstrings hold for Sphinx alone."""

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)[^)]*\)")
ROLE = re.compile(r":(?:func|mod|class|meth|data):(?=<code>)")


def on_config(config: Any, **_: object) -> Any:
    """Pages that the navigation does not place come last in it."""
    docs = Path(config["docs_dir"])
    rest = {str(page.relative_to(docs)) for page in docs.rglob("*.md")} - set(listed(config["nav"]))
    if rest:
        config["nav"].append({"More": sorted(rest)})
    return config


def listed(entry: Any) -> list[str]:
    """The pages of an entry of the navigation."""
    if isinstance(entry, str):
        return [entry]
    return [page for one in (entry.values() if isinstance(entry, dict) else entry) for page in listed(one)]


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: object) -> str:
    """Links to files outside ``docs``, such as sources, become their text."""
    docs, folder = Path(config["docs_dir"]), Path(page.file.abs_src_path).parent

    def text_or_link(found: re.Match[str]) -> str:
        target = (folder / found[2]).resolve()
        return found[1] if target.exists() and docs not in target.parents else found[0]

    return LINK.sub(text_or_link, markdown)


def on_page_content(html: str, **_: object) -> str:
    """Roles such as ``:func:`` before a name go."""
    return ROLE.sub("", html)
