"""Execute the notebooks of docs/ again and write their outputs into them: make notebook.

    python scripts/notebook.py [NOTEBOOK …]

A notebook runs in an empty folder, with this interpreter and this checkout. A cell that fails, or an output that names
a folder of this machine, leaves the file as it was.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 1800


def execute(path: Path) -> None:
    """Run the cells of a notebook and save it with what they put out, without times."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=LIMIT_S, record_timing=False, resources={"metadata": {"path": folder}}
        )
        client.execute()
        refuse_paths(path, notebook, [folder, str(ROOT), str(Path.home()), sys.prefix])
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def refuse_paths(path: Path, notebook: Any, folders: list[str]) -> None:
    """SystemExit where an output holds the name of one of the folders."""
    for number, cell in enumerate(notebook.cells, 1):
        named = [folder for folder in folders if folder in str(cell.get("outputs", ""))]
        if named:
            raise SystemExit(f"{path}: cell {number} puts out {named[0]}; print a relative path")


def main() -> None:
    """All notebooks, or those that are named."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    for path in [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        print(f"executing {path.name}")
        execute(path)


if __name__ == "__main__":
    main()
