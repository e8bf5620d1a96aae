"""``rltrain new``: every scaffold is written, its test passes, and its command composes."""

import importlib
import shlex
import sys

import pytest

from rltrain import cli
from rltrain.commands import new
from rltrain.errors import ConfigError


@pytest.mark.parametrize("kind", list(new.SCAFFOLDS))
def test_a_scaffold_passes_its_own_test_and_composes(kind, tmp_path, monkeypatch, capsys):
    name = f"my_{kind}"
    new.main([kind, name, "--folder", str(tmp_path)])
    written, *commands = capsys.readouterr().out.splitlines()
    assert f"test_{name}.py" in written and commands[0] == f"  python -m pytest test_{name}.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    try:
        test = vars(importlib.import_module(f"test_{name}"))[f"test_{name}"]
        test(tmp_path) if kind == "data" else test()
        words = shlex.split(commands[1].partition(" -m rltrain.train ")[2])
        config = cli.compose(cli.checked_overrides(words))
    finally:
        for module in (name, f"test_{name}"):
            sys.modules.pop(module, None)
    assert name in str(config)
    assert len(new.SCAFFOLDS[kind].code.splitlines()) <= 25


@pytest.mark.parametrize("name", ["my-part", "1st", "class", ""])
def test_a_name_that_python_cannot_import_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="not a name of Python"):
        new.write("reward", name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "test_mine.py").write_text("kept")
    with pytest.raises(ConfigError, match=r"test_mine.py: is there already"):
        new.write("reward", "mine", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test_mine.py"]
