"""Environments of the library verifiers run as they are, replayed turn by turn; skipped without the library."""

import dataclasses
import importlib.util
import signal

import pytest

from rltrain import cli
from rltrain.config import DataConfig
from rltrain.data import verifiers as data
from rltrain.data.mixture import MixtureConfig
from rltrain.environments.pool import EnvironmentPool
from rltrain.environments.verifiers import VerifiersConfig
from rltrain.errors import ConfigError
from rltrain.types import Reply

ID = "verifiers-environment"


@pytest.fixture(scope="module")
def library():
    pytest.importorskip("verifiers")
    if importlib.util.find_spec("verifiers.legacy") is None:
        pytest.skip("verifiers without its classic stack")


def problems(split="train", **arguments):
    return data.verifiers_problems(data.VerifiersDataConfig(env_id=ID, env_args=arguments), split)


def test_rows_become_problems_and_signals_stay(library):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    data.load.cache_clear()
    train, validation = problems(), problems("validation")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert (len(train), len(validation)) == (18, 2)
    assert train[0].prompt == [{"role": "system", "content": "Guess."}, {"role": "user", "content": "number 2"}]
    assert train[0].answer == "2"
    assert sorted(int(problem.answer) for problem in (*train, *validation)) == list(range(20))


def test_a_game_is_played_turn_by_turn(library):
    pool = EnvironmentPool(VerifiersConfig(env_id=ID, workers=1, reply_timeout_s=30.0))
    problem = next(each for each in problems() if each.answer == "7")
    (first,) = pool.start([problem])
    state = first.result(120).reply.state
    assert first.result().reply.failure == "" and state["texts"] == []

    def says(state, text):
        return pool.submit([(state, text)])[0].result(60).reply

    low = says(state, "3")
    assert (low.text, low.done, low.failure) == ("higher", False, "")
    high = says(low.state, "9")
    assert high.text == "lower"
    assert says(low.state, "9") == high  # the same (state, text) again
    assert says(high.state, "7") == Reply(text="", state=high.state | {"texts": ["3", "9", "7"]}, done=True, reward=0.0)
    right = says(low.state, "7")
    assert (right.done, right.reward, right.text) == (True, 0.5, "")
    assert says(state, "seven").failure == "error"  # the environment raised
    pool.close()


def test_tools_are_described_called_and_scored(library):
    pool = EnvironmentPool(VerifiersConfig(env_id=ID, env_args={"kind": "tools"}, role="tool", workers=1))
    problem = next(each for each in problems(kind="tools") if each.answer == "8")
    system, user = problem.prompt
    assert (system["role"], user) == ("system", {"role": "user", "content": "number 8"})
    assert '"name": "double"' in system["content"] and "Twice a number." in system["content"]
    (first,) = pool.start([problem])
    state = first.result(120).reply.state
    (future,) = pool.submit([(state, '<tool_call>\n{"name": "double", "arguments": {"number": 4}}\n</tool_call>')])
    reply = future.result(60).reply
    assert (reply.text, reply.called, reply.done, reply.failure) == ("8", True, False, "")
    (future,) = pool.submit([(reply.state, "8")])
    assert (future.result(60).reply.done, future.result().reply.reward) == (True, 1.0)
    pool.close()


@pytest.mark.parametrize(("settings", "message"), [
    ({"env_id": "no-such-game"}, "data.env_id=no-such-game: no module named no_such_game; install the environment's"),
    ({"env_id": ID, "env_args": {"levels": 3}}, "data.env_id=verifiers-environment: RuntimeError: Failed to load"),
])  # fmt: skip
def test_what_does_not_load_is_refused(library, settings, message):
    with pytest.raises(ConfigError) as error:
        data.verifiers_problems(data.VerifiersDataConfig(**settings), "train")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("installed", "message"), [
    ((), "data: needs the library verifiers, which is not installed; pip install 'rltrain[verifiers]'"),
    (
        ("verifiers",),
        "data: the installed verifiers has no classic stack (vf.Environment); pip install 'verifiers<0.4'",
    ),
])  # fmt: skip
def test_a_library_that_does_not_fit_is_named(monkeypatch, installed, message):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: name if name in installed else None)
    with pytest.raises(ConfigError) as error:
        data.VerifiersDataConfig(env_id=ID)
    assert str(error.value) == message


@pytest.mark.parametrize(("there", "message"), [
    ({"env_id": ID}, None),
    ({"env_id": "other"}, "environment.env_id=verifiers-environment: data.env_id is other; give both the same"),
    ({"env_id": ID, "env_args": {"kind": "tools"}}, "environment.env_args={}: data.env_args is {'kind': 'tools'}; "),
])  # fmt: skip
@pytest.mark.parametrize("in_mixture", [False, True])
def test_data_and_environment_name_the_same_game(monkeypatch, there, message, in_mixture):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: name)  # the library is asked for nothing else
    rows = data.VerifiersDataConfig(**there)
    environment = VerifiersConfig(env_id=ID)
    given = MixtureConfig(sources={"game": rows, "other": DataConfig()}) if in_mixture else rows
    if message is None:
        environment.check_data("data", given)
        return
    with pytest.raises(ConfigError) as error:
        environment.check_data("data", given)
    place = "data.sources.game" if in_mixture else "data"
    assert str(error.value).startswith(message.replace("data.", f"{place}."))


def test_a_run_checks_every_data_set_of_its_environment(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: name)
    run = cli.compose([])
    game = {"environment": VerifiersConfig(env_id=ID), "data": data.VerifiersDataConfig(env_id=ID)}
    assert dataclasses.replace(run, **game).environment == game["environment"]
    with pytest.raises(ConfigError, match=r"^environment.env_id=verifiers-environment: eval_data.env_id is other; "):
        dataclasses.replace(run, **game, eval_data=data.VerifiersDataConfig(env_id="other"))
