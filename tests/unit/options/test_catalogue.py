"""``rltrain list``: every choice, with a sentence from its own file, and nothing imported."""

import subprocess
import sys

import pytest

from rltrain import __main__ as commands
from rltrain import cli
from rltrain.errors import ConfigError
from rltrain.options import catalogue
from rltrain.registry import discover, parts
from rltrain.train import refuse_no_arguments


@pytest.mark.parametrize("group", list(catalogue.PACKAGES))
def test_what_is_read_is_what_is_registered(group):
    discover()
    here = [part.name for part in parts(group) if part.function.__module__.startswith("rltrain.")]
    assert sorted(choice.name for choice in catalogue.registered(group)) == here


def test_every_choice_has_a_sentence():
    for _, _, folder, group in catalogue.LISTS:
        assert [choice.name for choice in catalogue.choices(folder, group) if len(choice.summary) < 10] == []


def test_presets_are_the_files():
    names = [choice.name for choice in catalogue.choices("experiment", None)]
    assert names == sorted(path.stem for path in (cli.config_folder() / "experiment").glob("*.yaml"))
    assert {choice.name: choice.summary for choice in catalogue.choices("experiment", None)}["tempo"] == (
        "TEMPO on the quickstart's model and data."
    )


@pytest.mark.parametrize(("text", "sentence"), [
    ("One. Two.", "One."),
    ("Of v1.5 and e.g. this\nline: more. Then", "Of v1.5 and e.g. this line: more."),
    (":func:`rltrain.x.y` of ``z``", "y of z"),
    ("", ""),
])  # fmt: skip
def test_first_sentence(text, sentence):
    assert catalogue.first_sentence(text) == sentence


def test_lines_fit_the_terminal():
    assert max(map(len, catalogue.table().splitlines())) <= 120


@pytest.mark.parametrize(("arguments", "message"), [
    (["lsit"], "rltrain lsit: no such command; choose one of list, help, train"),
    (["list", "papers"], "rltrain list papers: no such list; choose one of experiments, algorithms"),
])  # fmt: skip
def test_what_does_not_exist_is_named(monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["rltrain", *arguments])
    with pytest.raises(ConfigError, match=message):
        commands.main()


def test_a_list_of_two_words(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rltrain", "list", "rollout", "engines"])
    commands.main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["rollout", "local", "vllm"]


def test_a_command_is_the_module(tmp_path):
    command = [sys.executable, "-m", "rltrain", "train", "batch.group_size=1", f"run_dir={tmp_path}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "a group baseline needs at least 2 samples" in result.stderr


def test_nothing_chosen_shows_the_experiments(capsys):
    with pytest.raises(ConfigError, match="nothing is chosen; give"):
        refuse_no_arguments([])
    assert "quickstart" in capsys.readouterr().out


def test_listing_and_help_import_no_torch():
    code = "import sys; from rltrain.__main__ import explain, show; show([]), explain(['train', 'batch', 'spae'])"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
