"""Functions, printed numbers and the tests' own helpers: what passes, and what never meets the program."""

import json

import pytest

from rltrain.rewards.code import CodeConfig, extract_code, read_tests, same_output, verify_code
from rltrain.rewards.code_tests import Unsupported, parse_assertions, same_data

SLOW = CodeConfig(deadline_s=20.0)
METHOD = "class Solution:\n    def add(self, a, b):\n        return a + b"
FUNCTION = "def add(a, b):\n    return a + b"
PATCHED = "import builtins\nbuiltins.sorted = lambda *a, **k: [0]\nbuiltins.len = lambda x: 2\n"
HELPER = "def same(a, b):\n    return sorted(a) == sorted(b)\n"


def score(source, answer="", meta=None, config=SLOW):
    return verify_code(f"```python\n{source}\n```", answer, meta or {}, config).score


# --- functions (APPS, TACO, LiveCodeBench) -----------------------------------------------------------------------

APPS = {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [[3], [7]]}
TACO = {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}
LIVE = {"inputs": ["1\n2", "[1]\n[2]"], "outputs": ["3", "[1, 2]"], "fn_name": "add"}
LIVE_ROWS = [{"input": "1\n2", "output": "3", "testtype": "functional"}]


@pytest.mark.parametrize("tests", [APPS, TACO, LIVE])
@pytest.mark.parametrize("source", [METHOD, FUNCTION])
def test_functions_run_as_functions_or_as_methods_of_solution(tests, source):
    assert score(source, json.dumps(tests)) == 1.0
    assert score(source.replace("a + b", "b if isinstance(a, list) else a - b"), json.dumps(tests)) == 0.0


def test_rows_of_livecodebench_with_the_name_in_the_metadata():
    meta = {"tests": LIVE_ROWS, "metadata": json.dumps({"func_name": "add"})}
    assert score(METHOD, meta=meta) == 1.0
    assert score(METHOD, meta={"tests": LIVE_ROWS, "fn_name": "add"}) == 1.0
    assert score(METHOD.replace("+", "*"), meta=meta) == 0.0
    stdin = {"tests": [{"input": "1 2", "output": "3", "testtype": "stdin"}]}
    assert score("print(sum(map(int, input().split())))", meta=stdin) == 1.0


def test_functions_that_fail_and_what_they_return():
    one = json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": [0.3]})
    assert score("def f(x): return 0.1 + 0.2", one) == 1.0
    assert score("def f(x): return 0.31", one) == 0.0
    assert score("def f(x): return str(0.3)", one) == 0.0
    assert score("def f(x): raise ValueError", one) == 0.0
    assert score("def g(x): return 0.3", one) == 0.0
    pairs = json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": [[[1, 2], [3, 4]]]})
    assert score("def f(x): return [(1, 2), (3, 4)]", pairs) == 1.0
    assert score("def f(x): return [(1, 2), (4, 3)]", pairs) == 0.0
    assert (
        score(
            "def f(x: List[int]) -> Optional[int]: return None", '{"fn_name": "f", "inputs": [[1]], "outputs": [null]}'
        )
        == 1.0
    )


def test_continuous_counts_functions():
    share = CodeConfig(kind="continuous", deadline_s=20.0)
    assert score("def add(a, b): return 3", json.dumps(APPS), config=share) == 0.5


def test_same_data_by_hand():
    assert same_data((1, 2), [1, 2]) and same_data({1: 2.0}, {"1": 2}) and same_data(1e9 + 1e-3, 1e9)
    assert (
        not same_data([1, 2], [2, 1])
        and not same_data("1", 1)
        and not same_data(1.1, 1)
        and not same_data({1: 2}, {"2": 2})
    )


# --- printed numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("2.500000", "2.5", True), ("0.30000000000000004", "0.3", True), ("1 2\n3", "1 2\n3\n", True),
        ("1\r\n2\r\n", "1\n2", True), ("1.0000001 2", "1.0 2", True), ("1  2", "1 2", True), ("1e-3", "0.001", True),
        ("3.0", "3", True), ("1000000.5", "1000000.0", True), ("2.51", "2.5", False), ("0.3001", "0.3", False),
        ("3.0001", "3", False), ("1000000000000000001", "1000000000000000000", False), ("4", "5", False),
        ("yes", "Yes", False), ("a  b", "a b", False), ("1 2", "1 2 3", False), ("1\n2", "1 2", False),
        ("nan", "0.5", False), ("", "0.5", False), ("2.5x", "2.5", False),
    ],
)  # fmt: skip
def test_printed_numbers(output, expected, same):
    assert same_output(output, expected) is same


def test_lines_as_a_list_are_joined():
    tests = '{"inputs": [["1", "2"]], "outputs": [["3"]]}'
    assert score("print(int(input()) + int(input()))", tests) == 1.0
    assert score("print(int(input()) - int(input()))", tests) == 0.0


# --- blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "source"),
    [
        ("```python\nprint(1)\n```\nOutput:\n```\n1\n```", "print(1)\n"),
        ("```python\nprint(1)\n```\n```text\n1\n```", "print(1)\n"),
        ("```python\r\nprint(1)\r\n```\r\n", "print(1)\n"),
        ("```Python3\nprint(1)\n```", "print(1)\n"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("```text\nsample\n```\nthen\n```\nprint(1)\n```", "print(1)\n"),
        ("```py\na\n```\n```python\nb\n```", "b\n"),
        ("```json\n1\n```", None),
        ("```python\nprint(1)", None),
    ],
)
def test_which_block_is_the_program(completion, source):
    assert extract_code(completion) == source


# --- values that are not plain -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "answer", "expected"),
    [
        ("from collections import deque\ndef f(x): return deque(x)", "assert list(f([1,2])) == [1,2]", 1.0),
        ("from collections import deque\ndef f(x): return deque(x)", "assert list(f([1,2])) == [2,1]", 0.0),
        ("from collections import deque\ndef f(x): return deque(x)", "assert f([1,2]) == [1,2]", 0.0),
        ("def f(x): return (i * i for i in x)", "assert list(f([1,2])) == [1,4]", 1.0),
        ("def f(x): return map(str, x)", "assert sorted(f([2,1])) == ['1','2']", 1.0),
        ("def f(x): return {1: 2}.keys()", "assert set(f(0)) == {1}", 1.0),
        ("import re\ndef f(s): return re.match('a', s)", "assert f('annie')", 1.0),
        ("import re\ndef f(s): return re.match('b', s)", "assert f('annie')", 0.0),
        ("import re\ndef f(s): return re.match('b', s)", "assert not f('annie')", 1.0),
        ("import itertools\ndef f(x): return itertools.count()", "assert list(f(0)) == [0]", 0.0),
    ],
)
def test_iterables_and_truth(source, answer, expected):
    assert score(source, answer) == expected


# --- the tests' own code -----------------------------------------------------------------------------------------


def test_helpers_judge_away_from_the_program():
    answer = HELPER + "assert same(f(1), [2, 1])"
    assert score("def f(x): return [1, 2]", answer) == 1.0
    assert score("def f(x): return [1, 3]", answer) == 0.0
    assert score(PATCHED + "def f(x): return [1, 3]", answer) == 0.0
    assert score(PATCHED + "def same(a, b): return True\ndef f(x): return [1, 3]", answer) == 0.0
    assert score("def f(x): return {1, 2}", answer) == 1.0


def test_code_of_the_test_that_is_no_literal_judges_there_too():
    assert score("def f(x): return 'a,b'", "assert f(1) == ','.join(['a', 'b'])") == 1.0
    assert score("def f(x): return 'a,b'", "assert f(1) == ','.join(['b', 'a'])") == 0.0
    assert score("def f(x): return [0, 1, 2]", "assert f(3) == list(range(3))") == 1.0
    assert score("def f(x): return 2.0", "import math\nassert f(4) == math.sqrt(4)") == 1.0
    assert score("def f(x): return 3.0", "import math\nassert f(4) == math.sqrt(4)") == 0.0
    assert score("def f(x): return x", "want = [7]\nassert f([7]) == want") == 1.0
    assert score("def f(x): return x", "given = [7]\nassert f(given) == given\nassert f(given) != [8]") == 1.0


def test_neither_helpers_nor_expected_values_are_beside_the_program():
    hunt = (
        "import gc, sys\ndef f(x):\n    seen = [repr(sys._getframe(k).f_globals) for k in range(1, 3)]\n"
        "    seen += [repr(o) for o in gc.get_objects() if isinstance(o, (dict, list)) and len(o) < 100]\n"
        "    return any('867' + str(53) in text or 'same_' + 'helper'[:6] + 's' in text for text in seen)"
    )
    answer = "def same_helpers(a, b): return a == b\nwant = 86753\nassert same_helpers(f(1), want == 1)"
    assert score(hunt, answer) == 1.0
    assert score(hunt, "want = 86753\nassert f(want) == True") == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "def run(x, want): return f(x) == want\nassert run(1, 2)",
        "assert all(f(i) == i for i in range(3))",
        "def tree(x): return [x]\nassert f(tree(1)) == 1",
        "assert {True: 1}[f(1) == 4]",
    ],
)
def test_tests_that_would_show_the_program_what_is_expected_abstain(answer):
    assert score("def f(x): return x", answer) is None


def test_inputs_made_of_calls_run_beside_the_program():
    (one,) = parse_assertions("assert [f(i) for i in range(3)] == [0, 1, 4]")
    assert one.calls == ("[f(i) for i in range(3)]",) and not one.judged
    assert score("def f(x): return x * x", "assert [f(i) for i in range(3)] == [0, 1, 4]") == 1.0
    with pytest.raises(Unsupported):
        read_tests("assert len([1]) == 1", {})
