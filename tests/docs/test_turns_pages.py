"""The pages on turns: the first environment as a reader runs it, the tools of a TRL user."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from tiny_run import OVERRIDES, metrics

from rltrain import cli, trainer
from rltrain.types import Problem

ROOT = Path(__file__).parents[2]
SHORT = [one for one in OVERRIDES if not one.startswith(("data=", "reward@", "steps="))]


def page(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def module_of(tmp_path, monkeypatch):
    """A page's file of Python, as a module that worker processes find, too."""
    loaded = []

    def load(text, name):
        (block,) = [one for one in blocks(text, "python") if one.startswith(f"# {name}.py\n")]
        (tmp_path / f"{name}.py").write_text(block)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
        loaded.append(name)
        return importlib.import_module(name), block

    yield load
    for name in loaded:
        del sys.modules[name]


def test_the_first_environment_trains(module_of, tmp_path):
    guess, block = module_of(page("turns.md"), "guess")
    assert len(block.splitlines()) - 1 <= 25
    game = guess.Guess()
    state = game.start(Problem(id="p", prompt="", answer="7"))
    low = game.respond(state, "3?")
    assert (low.text, low.done, low.called) == (" higher\n", False, True)
    assert game.respond(low.state, "9?").text == " lower\n"
    right = game.respond(low.state, " 7?")
    assert (right.done, right.reward) == (True, 0.5)  # the second guess
    assert game.respond(state, "no question").done and game.respond(state, "x?").text == " a number, please\n"
    (command,) = blocks(page("turns.md"), "bash")
    program, dash_m, module, *overrides = shlex.split(command.replace("\\\n", " "))
    assert (program, dash_m, module) == ("python", "-m", "rltrain.train")
    room = ["sampling.max_new_tokens=40", "environment.reply_tokens=16", "batch.token_budget=512", "steps=1"]
    trainer.fit(cli.compose([*SHORT, *overrides, *room, f"run_dir={tmp_path / 'run'}"]))
    last = metrics(tmp_path / "run")[-1]
    assert last["step"] == 1 and last["turns/mean"] >= 1 and last["environment/errors"] == 0


def test_tools_of_a_trl_user(module_of):
    tools, _ = module_of(page("from_trl.md"), "my_tools")
    made = tools.Tools()
    state = made.start(Problem(id="p", prompt="", answer=""))
    call = {"name": "multiply", "arguments": {"a": 6, "b": 7}}
    reply = made.respond(state, f"so <tool_call>\n{json.dumps(call)}\n</tool_call>")
    assert (reply.text, reply.state, reply.called, reply.done) == ("42", [call], True, False)
    assert json.loads(made.respond(state, '<tool_call>{"name": "add"}</tool_call>').text) == {"error": "'add'"}
    assert made.respond(state, "42").done


def test_a_protocol_of_verifiers_as_a_class(module_of):
    countdown, _ = module_of(page("from_verifiers.md"), "countdown")
    made = countdown.Countdown()
    first = made.respond(made.start(Problem(id="p", prompt="", answer="7")), "5")
    assert (first.text, first.done) == ("2 tries left", False)
    assert made.respond(first.state, "it is 7").done
    assert made.respond(made.respond(first.state, "5").state, "5").done  # the third try
