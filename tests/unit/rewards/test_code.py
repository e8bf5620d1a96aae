"""Programs in the sandbox: what passes, and every way of cheating or breaking out that must not."""

import socket

import pytest

from rltrain.errors import ConfigError
from rltrain.rewards.code import CodeConfig, code, extract_code, read_tests, verify_code
from rltrain.rewards.code_tests import Unsupported, parse_assertions
from rltrain.types import Completion, Context, Group, Problem, Prompt

SQUARES = "assert f(2) == 4\nassert f(3) == 9\n"
DOUBLE = {"tests": {"inputs": ["2\n", "3\n"], "outputs": ["4\n", "6\n"]}}
QUICK = CodeConfig(deadline_s=1.0)
SLOW = CodeConfig(deadline_s=20.0)
FORGED = """import os
for fd in range(3, 64):
    try: os.write(fd, b'{"value": 5}\\n' * 9)
    except OSError: pass
os._exit(0)"""


def block(source):
    return f"Here it is:\n```python\n{source}\n```\nDone."


def verdict(source, *, answer=SQUARES, meta=None, config=SLOW):
    return verify_code(block(source), answer, meta or {}, config)


def test_right_programs_pass():
    assert verdict("def f(x): return x * x").score == 1.0
    assert verdict("print(int(input()) * 2)", meta=DOUBLE).score == 1.0
    assert verdict("import sys\nfor line in sys.stdin: print(2 * int(line))", meta=DOUBLE).score == 1.0
    assert verdict("print(2 * int(open(0).read()), '')", meta=DOUBLE).score == 1.0


def test_continuous_is_the_share_of_tests():
    share = CodeConfig(kind="continuous", deadline_s=20.0)
    assert verdict("def f(x): return 4", config=share).score == 0.5
    assert verdict("def f(x): return 4").score == 0.0
    result = verdict("print(4)", meta=DOUBLE, config=share)
    assert (result.score, result.status, result.passed, result.total) == (0.5, "wrong", 1, 2)


def test_humaneval_style_check():
    tests = (
        "META = {}\ndef check(candidate):\n    assert candidate(1, 2) == 3\n"
        "    assert abs(candidate(.1, .2) - .3) < 1e-6\n"
    )
    assert verdict("def add(a, b): return a + b", answer=tests + "check(add)").score == 1.0
    assert verdict("def add(a, b): return a - b", answer=tests + "check(add)").score == 0.0


def test_setup_containers_and_functions_of_the_test():
    tests = [
        "s = Stack()",
        "s.push(3)",
        "assert s.pop() == 3",
        "assert sorted(g()) == [1, 2]",
        "assert h() == {'a': (1, None)}",
    ]
    program = (
        "class Stack(list):\n    def push(self, x): self.append(x)\n"
        "def g(): return {2, 1}\ndef h(): return {'a': (1, None)}"
    )
    assert verdict(program, meta={"tests": tests}).score == 1.0
    assert verdict(program.replace("(1, None)", "[1, None]"), meta={"tests": tests}).score == 0.0


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("def f(x):\n    while True: pass", "timeout"),
        ("import time\ntime.sleep(60)", "timeout"),
        ("import signal, time\nfor s in (2, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass", "timeout"),
        ("x = bytearray(100 * 2**30)", "memory"),
        ("import os\nos._exit(0)", "no_result"),
        ("import sys\nsys.exit(0)", "no_result"),
        ("def f(x): raise SystemExit(0)", "no_result"),
        ("def f(x): return 1 / 0", "exception"),
        ("def f(x", "exception"),
        ("def g(x): return x", "exception"),
        ("class E:\n    def __eq__(s, o): return True\ndef f(x): return E()", "wrong"),
        ("class E(int):\n    def __eq__(s, o): return True\ndef f(x): return E(1)", "wrong"),
        ("class E(str):\n    def __eq__(s, o): return True\ndef f(x): return E('4')", "wrong"),
        ("import builtins\nbuiltins.abs = lambda x: 0\ndef f(x): return 5", "wrong"),
        (FORGED, "wrong"),
        ("print('4'); print('9')\ndef f(x): return None", "wrong"),
        ("def f(x): return [[0]] * 10**5", "output"),
    ],
)  # fmt: skip
def test_cheats_and_failures_of_calls(source, status):
    result = verdict(source, config=QUICK if status == "timeout" else SLOW)
    assert (result.score, result.status) == (0.0, status)


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("exit(0)", "no_result"),
        ("import sys\nwhile True: sys.stdout.write('x' * 65536)", "output"),
        ("print('4\\n6')", "wrong"),
        ("import os\nfor _ in range(100000): os.fork()", "exception"),
        ("open('big', 'wb').write(bytes(2**26))", "exception"),
        ("print(4)\nraise ValueError", "exception"),
    ],
)
def test_cheats_and_failures_of_printing(source, status):
    result = verdict(source, meta=DOUBLE)
    assert (result.score, result.status) == (0.0, status)


def test_fork_bomb_does_not_outlive_its_verdict():
    result = verdict("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", meta=DOUBLE, config=QUICK)
    assert (result.score, result.status) == (0.0, "timeout")


def test_neither_network_nor_the_runs_files_nor_its_memory(tmp_path):
    secret = tmp_path / "tests.py"
    secret.write_text("assert f(2) == 4")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        net = verdict(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\nprint(4)", meta=DOUBLE)
    assert (net.score, net.status) == (0.0, "exception")
    for path in (secret, "/proc/self/status", f"/proc/{__import__('os').getpid()}/mem", "/etc/passwd"):
        read = verdict(f"print(open({str(path)!r}, 'rb').read(1))", meta=DOUBLE)
        assert (read.score, read.status) == (0.0, "exception"), path


def test_expected_values_are_not_in_the_program_process():
    hunt = (
        "import gc, sys\ndef f(x):\n    frame, seen = sys._getframe(), []\n"
        "    while frame: seen += [repr(frame.f_locals), repr(frame.f_globals)]; frame = frame.f_back\n"
        "    seen += [repr(o) for o in gc.get_objects() if isinstance(o, (dict, list)) and len(o) < 100]\n"
        "    return any('867' + '53' in text for text in seen)"
    )
    assert verdict(hunt, answer="assert [f(1), 0] in ([86753, 0], [False, 0])").score == 1.0
    assert verdict(hunt, answer="assert f(86753) in (True, 1)").score == 1.0


def test_environment_of_the_run_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    source = "import os\ndef f(x): return 'WANDB_API_KEY' in os.environ"
    assert verdict(source, answer="assert f(0) == False").score == 1.0


def test_tests_that_cannot_be_judged_abstain():
    for answer in (
        "",
        "x = 1",
        "assert 1 == 1",
        "for i in range(3):\n    assert f(i) == i",
        "assert (",
        "[1, 2]",
        "assert f(1) == 2 ** 3",
    ):
        result = verdict("def f(x): return x", answer=answer)
        assert (result.score, result.status) == (None, "gold_error"), answer
    silent = {"tests": {"inputs": [""], "outputs": [""]}}
    assert verdict("pass", meta=silent).status == "gold_error"


def test_extraction_takes_the_last_closed_block_after_the_thinking():
    assert extract_code("```python\nx=1\n```\n```python\ny=2\n```\n") == "y=2\n"
    assert extract_code("```\nx=1\n```\n```\ny=2\n```\n") == "y=2\n"
    assert extract_code("```python\nx=1") is None
    assert extract_code("<think>```python\nx=1\n```") is None
    assert extract_code("no code") is None


def test_assertions_are_split_at_what_needs_the_program():
    (one,) = parse_assertions("assert abs(f(1) - g(2).x) <= 1e-9 and f(3) != [4]")
    assert one.calls == ("f(1)", "g(2).x", "f(3)")
    with pytest.raises(Unsupported):
        read_tests("assert True", {})


def test_reward_groups_and_metrics():
    texts = [block("def f(x): return x * x"), block("def f(x): return x"), "no code", block("def f(x): return x * x")]
    completions = tuple(Completion(token_ids=(1,), logprobs=(0.0,), finish="stop", text=text) for text in texts)
    problem = Problem(id="p", prompt="q", answer=SQUARES)
    result = code([Group(prompt=Prompt(problem=problem, token_ids=(1,)), completions=completions)], SLOW, Context())
    assert result.scores == [[1.0, 0.0, 0.0, 1.0]]
    assert (result.metrics["code/passed"].total, result.metrics["code/no_answer"].total) == (2, 1)


def test_rules():
    with pytest.raises(ConfigError, match="reward.kind=partial"):
        CodeConfig(kind="partial")
