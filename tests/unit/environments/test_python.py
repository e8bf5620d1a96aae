"""The notebook: cells are replayed, output is cut with a mark, and a program of any kind costs its cell."""

import pytest

from rltrain.environments.python import Notebook, PythonConfig
from rltrain.types import Problem

PROBLEM = Problem(id="a", prompt="?", answer="")


@pytest.fixture(scope="module")
def notebook():
    return Notebook(PythonConfig(reply_timeout_s=2.0, memory_mib=256, output_characters=60, call_reward=1.0))


def run(notebook, *cells):
    """The text inside <output> of each cell, and the state after the last."""
    state, shown = notebook.start(PROBLEM), []
    for cell in cells:
        reply = notebook.respond(state, f"<python>{cell}</python>")
        assert reply.called and not reply.done and not reply.failure
        state, text = reply.state, reply.text
        shown.append(text.removeprefix("<output>").removesuffix("</output>"))
    return shown, state


def test_cells_share_names_and_earlier_output_is_not_repeated(notebook):
    shown, state = run(notebook, "\nx = 2 + 3\nprint('first')\n", "import math\nx * 7", "print(x)\nmath.sqrt(x * x)")
    assert shown == ["first", "35", "5\n5.0"]
    assert state == ["x = 2 + 3\nprint('first')", "import math\nx * 7", "print(x)\nmath.sqrt(x * x)"]


def test_an_exception_ends_its_cell_alone(notebook):
    shown, state = run(notebook, "y = 1\n1/0\ny = 2", "y", "z", "def f(:")
    assert shown[:3] == ["ZeroDivisionError: division by zero", "1", "NameError: name 'z' is not defined"]
    assert shown[3].startswith('File "cell", line 1') and "SyntaxError" in shown[3]
    assert len(state) == 4


@pytest.mark.parametrize(("cell", "shown"), [
    ("while True: pass", "TimeoutError: the cell took too long"),
    ("len(bytearray(2**33))", "MemoryError"),
    ("import os\nprint('half', flush=True)\nos._exit(3)", "half\nthe process ended (exit code 3)"),
])  # fmt: skip
def test_a_cell_that_was_stopped_is_not_kept(notebook, cell, shown):
    texts, state = run(notebook, "x = 1", cell, "x")
    assert texts == ["", shown, "1"]
    assert state == ["x = 1", "x"]


def test_output_is_cut_with_a_mark(notebook):
    (shown,), _state = run(notebook, "print('a' * 100)")
    assert shown == "a" * 60 + "\n[40 more characters]"
    (flood,), kept = run(notebook, "while True: print('b' * 1000)")
    assert flood.startswith("b" * 60 + "\n[") and flood.endswith(" more characters]") and kept == []


def test_the_same_cells_give_the_same_reply(notebook):
    cells = ("import random", "[random.random(), hash('a'), list({'x', 'y', 'z', 'w'})]")
    assert run(notebook, *cells) == run(notebook, *cells)


def test_rewards_and_the_end(notebook):
    assert notebook.respond([], "<python>1</python>").reward == 1.0
    assert notebook.respond([], "<python>1/0</python>").reward == 0.0
    assert notebook.respond(["x"], "The answer is 3").done
    assert notebook.key(["a"]) != notebook.key(["b"]) == notebook.key(["b"])
