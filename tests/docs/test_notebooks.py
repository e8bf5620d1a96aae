"""The executed notebooks: cells compile, names exist and are public, outputs name no machine. The task for lm-eval."""

import ast
import importlib
import json
from pathlib import Path

import pytest

from rltrain import cli
from rltrain.data.random_calculation import random_calculation

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def test_a_notebook_is_linked_from_a_page():
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    assert NOTEBOOKS and [path.name for path in NOTEBOOKS if f"](notebooks/{path.name})" not in pages] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_compile_and_take_public_names_that_exist(path):
    trees = [compile("".join(cell["source"]), path.name, "exec", ast.PyCF_ONLY_AST) for cell in code_cells(path)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    assert [node.attr for node in nodes if isinstance(node, ast.Attribute) and node.attr.startswith("_")] == []
    taken = [(node.module, alias.name) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert ("rltrain.api", "train") in taken
    for module, name in taken:
        assert not name.startswith("_") and "._" not in module
        assert hasattr(importlib.import_module(module), name) or importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_executed_in_order_small_and_names_no_machine(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert [word for word in ("/tmp", "/work", "/home", "/root", "site-packages") if word in texts(outputs)] == []
    assert path.stat().st_size < 200_000


def texts(outputs: list[dict]) -> str:
    """What the outputs say, without pictures."""
    shown = [value for each in outputs for kind, value in each.get("data", {}).items() if kind != "image/png"]
    return json.dumps([shown, [each.get("text", "") for each in outputs]])


def test_the_settings_of_the_notebook_are_in_the_config():
    (call,) = [
        node
        for cell in code_cells(ROOT / "docs/notebooks/first_run.ipynb")
        for node in ast.walk(ast.parse("".join(cell["source"])))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "train"
    ]
    keys = {key.arg: ast.literal_eval(key.value) for key in call.keywords if key.arg != "advantage"}
    words = [
        f"{key}.{name}={each}" for key, value in keys.items() if isinstance(value, dict) for name, each in value.items()
    ]
    config = cli.compose(["+experiment=quickstart", *words, f"steps={keys['steps']}"])
    assert config.steps <= 20 and config.cold_start.steps <= 150


def test_the_problems_of_lm_eval_are_the_first_test_problems():
    lines = (ROOT / "scripts/lm_eval/small_integers.jsonl").read_text().splitlines()
    problems = random_calculation(cli.compose(["+experiment=quickstart"]).data, "test")[: len(lines)]
    assert [json.loads(line) for line in lines] == [{"prompt": each.prompt, "answer": each.answer} for each in problems]
    assert len(lines) == 200
