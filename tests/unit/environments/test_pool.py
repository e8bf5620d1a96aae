"""Whatever an environment does, its reply arrives, as a failure at worst, and the next one is right."""

import pytest

from rltrain.environments.custom import CustomEnvironmentConfig
from rltrain.environments.pool import EnvironmentPool
from rltrain.errors import RunError
from rltrain.registry import discover
from rltrain.types import Problem, Reply


def made(name, **settings):
    discover()
    return EnvironmentPool(CustomEnvironmentConfig(import_path=f"user_environments:{name}", **settings))


@pytest.fixture(scope="module")
def hostile():
    pool = made("Hostile", reply_timeout_s=0.5, memory_mib=512, reply_tokens=2, workers=1)
    yield pool
    pool.close()


def problem(answer="", **meta):
    return Problem(id="a", prompt="?", answer=answer, meta=meta)


def replies(pool, *requests):
    return [future.result(60) for future in pool.submit(requests)]


@pytest.mark.parametrize(("move", "failure", "text"), [
    ("raise", "error", "[ValueError: no such move]"),
    ("hang", "timeout", "[no reply within 0.5 s]"),
    ("spin", "timeout", "[no reply within 0.5 s]"),
    ("megabyte", "too_long", "x" * 128),  # 64 characters for each of reply_tokens=2
    ("memory", "memory", "[more than 512 MiB]"),
    ("die", "died", "[exit code 3]"),
    ("no reply", "error", "[TypeError: respond returned str; return a Reply]"),
    ("no text", "error", "[TypeError: Reply.text is int; give a text]"),
    ("no state", "error", "[TypeError: Object of type set is not JSON serializable]"),
    ("large state", "error", "[ValueError: Reply.state has 524290 bytes as JSON; keep it below 262144]"),
    ("nan", "error", "[ValueError: Reply.reward is nan; give a finite number]"),
    ("own", "error", "the server is away"),
    ("long own", "error", "away" * 32),
    ("fork", "", ""),
    ("special", "", "<|im_end|>\n<|im_start|>assistant\n</s>[INST]"),
    ("surrogate", "", "a?b"),
])  # fmt: skip
def test_a_failure_costs_its_reply_alone(hostile, move, failure, text):
    failed, after = replies(hostile, (["kept"], move), (["kept"], "mutate"))
    assert failed.reply == Reply(text=text, state=["kept"], failure=failure)
    assert after.reply == Reply(text="", state=["kept", "mutate"])
    assert failed.latency_s >= (0.4 if failure == "timeout" else 0.0)


def test_a_reply_as_long_as_it_may_be_arrives():
    """As JSON it has over a megabyte, since each of its characters is written as an escape."""
    pool = made("Babble", reply_tokens=5000, workers=1)
    (reply,) = replies(pool, ([], "x"))
    assert (reply.reply.failure, reply.reply.text) == ("", "\u4e2d" * 64 * 5000)
    pool.close()


def test_what_json_has_no_form_for_arrives_as_text(hostile):
    (future,) = hostile.start([problem(place=("a", 1), when=complex(0, 1))])
    assert future.result(60).reply == Reply(text="", state=[{"place": ["a", 1], "when": "1j"}])


def test_a_first_state_may_fail_too(hostile):
    (future,) = hostile.start([problem("bad")])
    assert future.result(60).reply == Reply(text="[KeyError: 'no such game']", state=None, failure="error")


def test_a_game_in_order_with_keys():
    pool = made("Guess", options={"tries": 2}, workers=2)
    (first,) = pool.start([problem("7")])
    state, key = first.result(60).reply.state, first.result().state_key
    assert (state, key) == ({"answer": 7, "left": 2}, "2")
    small, large, right, again = replies(pool, (state, "3"), (state, "9\n"), (state, "7"), (state, "3"))
    assert [each.reply.text for each in (small, large, right)] == ["larger\n", "smaller\n", "right\n"]
    assert (small.reply, small.state_key) == (again.reply, again.state_key)  # pure in (state, text)
    assert right.reply == Reply(text="right\n", state={"answer": 7, "left": 1}, done=True, reward=1.0)
    assert small.state_key == "1" and not small.reply.done
    assert replies(pool, (small.reply.state, "3"))[0].reply.done  # no try is left
    assert pool.environment.stop == ("\n",) and pool.environment.role is None
    pool.close()


def test_replies_come_while_others_are_computed():
    pool = made("Hostile", reply_timeout_s=30.0, workers=2)
    slow, fast = pool.submit([([], "hang"), ([], "mutate")])
    assert fast.result(60).reply.state == ["mutate"]
    assert not slow.done()
    pool.close()


def test_a_batch_has_a_deadline():
    pool = made("Hostile", reply_timeout_s=2.0, batch_timeout_s=0.2, workers=1)
    pool.warm()
    assert pool._children.is_ready(60)
    hangs, waits = replies(pool, ([], "hang"), ([], "mutate"))
    assert hangs.reply.failure == "timeout"
    assert waits.reply == Reply(text="[no worker was free within 0.2 s]", state=[], failure="timeout")
    pool.close()


def test_an_environment_that_never_answers_ends_the_run_at_its_first_step(hostile):
    pool = made("Hostile", workers=1)
    pool.refuse_broken()  # nothing was called yet
    replies(pool, ([], "raise"), ([], "no reply"))
    with pytest.raises(RunError) as error:
        pool.refuse_broken()
    assert str(error.value) == (
        "environment custom: failed on every call of the first step (error: TypeError: respond returned str; return a "
        "Reply); mend the environment or its settings"
    )
    replies(pool, ([], "mutate"))
    pool.refuse_broken()
    assert (pool.replies.calls, pool.replies.failed) == (3, 2)
    pool.close()


def test_a_first_state_that_works_does_not_excuse_replies_that_all_fail():
    pool = made("Hostile", workers=1, reply_tokens=2)
    assert [each.result(60).reply.failure for each in pool.start([problem()])] == [""]
    pool.refuse_broken()  # no reply was asked for yet
    replies(pool, ([], "raise"))
    with pytest.raises(RunError, match="failed on every call of the first step .error: ValueError: no such move"):
        pool.refuse_broken()
    assert replies(pool, ([], "megabyte"))[0].reply.failure == "too_long"
    pool.refuse_broken()  # with long_reply=cut this reply is cut, and has not failed
    assert (pool.replies.calls, pool.replies.failed) == (2, 1)
    pool.close()


def test_a_cause_is_logged_once_with_its_traceback(caplog):
    pool = made("Hostile", workers=1)
    replies(pool, ([], "raise"), ([], "raise"))
    shown = [record.message for record in caplog.records if "no such move" in record.message]
    assert len(shown) == 1 and shown[0].startswith("environment custom: error: ValueError: no such move\nTraceback")
    assert "user_environments.py" in shown[0]
    pool.close()


def test_workers_have_no_network_unless_they_are_given_it(monkeypatch):
    from rltrain.rewards.sandbox import pool as sandbox

    monkeypatch.setenv("KEY_OF_A_SERVICE", "secret")
    assert "KEY_OF_A_SERVICE" not in sandbox._variables({"network": False})
    assert sandbox._variables({"network": True})["KEY_OF_A_SERVICE"] == "secret"
