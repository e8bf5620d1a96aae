"""``rltrain help``: the keys that the source describes are those of the config, and each is described."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from rltrain import __main__ as commands
from rltrain.config import RunConfig
from rltrain.errors import ConfigError
from rltrain.options import described as source
from rltrain.options import help as help_pages
from rltrain.options import keys
from rltrain.registry import discover, parts

ROOT = Path(__file__).parents[3]


def test_the_keys_of_the_source_are_those_of_the_config():
    discover()
    names = {part.name for part in parts() if part.function.__module__.startswith("rltrain.")}

    def ours(choices):  # a test before this one may have registered parts of its own
        return sorted(choice for choice in choices if choice.rpartition("=")[2] in names)

    known = {path: key for path, key in keys.known_keys().items() if not key.choices or ours(key.choices)}
    found = source.described().keys
    assert {path: ours(key.choices) for path, key in known.items()} == {
        path: sorted(key.choices) for path, key in found.items()
    }


def test_defaults_are_those_of_the_config():
    stated = {name: entry.default for name, entry in source.all_fields("BatchConfig").items()}
    assert stated == {
        "prompts_per_step": "16", "group_size": "8", "minibatches": "1", "update_epochs": "1", "token_budget": "16384",
        "packing": "auto", "dynamic_sampling": "false", "max_sampling_attempts": "10",
    }  # fmt: skip
    loss = source.described().keys
    assert (loss["loss.dual_clip"].default, loss["optimizer.betas"].default) == ("null", "[0.9, 0.999]")


def test_a_description_stands_behind_above_or_in_the_docstring(monkeypatch, tmp_path):
    (tmp_path / "some.py").write_text(
        'class SomeConfig:\n    """Head. ``third`` is in here. Not here."""\n\n    first: int = 1  # behind\n'
        "    # above,\n    # in two lines\n    second: list = 2\n    third: str = ''\n    fourth: str = MISSING\n"
    )
    monkeypatch.setattr(source.catalogue, "PACKAGE", tmp_path)
    source.classes.cache_clear()
    try:
        entries = source.classes()["SomeConfig"].fields
    finally:
        source.classes.cache_clear()
    assert [(name, entry.default, entry.text) for name, entry in entries.items()] == [
        ("first", "1", "behind"), ("second", "2", "above, in two lines"), ("third", "''", "third is in here."),
        ("fourth", "", ""),
    ]  # fmt: skip


@pytest.mark.parametrize("name", list(help_pages.READS))
def test_the_help_of_a_command_fits_two_screens(name):
    text = commands.explain([name])
    assert len(text.splitlines()) <= 48 and max(map(len, text.splitlines())) <= 120
    assert set(help_pages.READS[name].split()) <= {field.name for field in dataclasses.fields(RunConfig)}


@pytest.mark.parametrize(("topic", "lines"), [
    ("batch.token_budget", ["batch.token_budget   int, default 16384", "most tokens of a micro-batch"]),
    ("rewards.answer.weight", ["rewards.answer.weight   Any, default 1.0", "factor of this reward in the sum, or a"]),
    ("model.path", ["model.path   str, default none, it must be set", "belongs to model=pretrained, model=tiny"]),
    ("loss", ["The policy loss", "loss.kl_coef=0.0 ", "weight of the KL to the reference"]),
    ("reward", ["rewards.*", "reward@rewards.answer=…", "rltrain help reward=…"]),
    ("advantage=spae", ["advantage=spae   SPAE", "continuations=5", "answers drawn behind each step"]),
    ("dapo", ["algorithm=dapo", "override /advantage: group"]),
    ("keys", ["batch.group_size=8", "checkpoint.keep_best=true"]),
])  # fmt: skip
def test_help_on_a_topic(topic, lines):
    text = commands.explain([topic])
    assert [line for line in lines if line not in text] == []


def test_help_on_nothing_known_names_what_was_meant():
    with pytest.raises(ConfigError, match=r"rltrain help lr: no such command.*did you mean optimizer.learning_rate\?"):
        commands.explain(["lr"])
    with pytest.raises(ConfigError, match="rltrain help zzzz: .*rltrain help keys lists the keys"):
        commands.explain(["zzzz"])


def test_help_of_a_command_through_the_console(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rltrain", "sft", "--help"])
    commands.main()
    assert "python -m rltrain.sft +experiment=NAME" in capsys.readouterr().out


def test_completion_in_bash():
    """The script's words, with a stand-in for the command that prints what it was given."""
    script = """
rltrain() { [ $# = 0 ] && printf '  list  x\\n  plan  y\\n' || echo "$1/${COMP_LINE/ /_} a=1"; }
source scripts/completion.bash
COMP_WORDS=(rltrain pl) COMP_CWORD=1; _rltrain; echo "${COMPREPLY[@]}"
COMP_WORDS=(rltrain train a) COMP_CWORD=2; _rltrain; echo "${COMPREPLY[@]}"
COMP_WORDS=(rltrain train t) COMP_CWORD=2; _rltrain; echo "${COMPREPLY[@]}"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.splitlines() == ["plan", "a=1", "train/rltrain_t"]
