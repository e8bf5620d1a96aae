"""What a report says of turns, on a folder made of a hand-made group; and that it is silent without them."""

import json
import re

import pytest
import yaml
from turn_groups import Letters, advantages, answered, called, failed, group

from rltrain.report import page
from rltrain.report.credit import credit
from rltrain.report.curves import is_share
from rltrain.report.folder import read_run
from rltrain.report.warnings import all_warnings
from rltrain.runs.run_folder import sample_rows, write_samples
from rltrain.types import Completion

PLAIN = Completion(token_ids=(1, 2), logprobs=(-0.5, -0.5), finish="stop", text="ab")


def folder(path, *completions):
    made = group(*completions)
    write_samples(path, "step_000001", sample_rows(1, [made], advantages(made), Letters()))
    metrics = [{"step": step, "reward": 0.5, "turns/mean": 1.5, "environment/errors": 0.2} for step in range(2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (path / "config.yaml").write_text(
        yaml.safe_dump({"advantage": {"kind": "group"}, "environment": {"kind": "guess"}})
    )
    return path


def shown(path):
    return credit(read_run(path, label="run"), estimators=["grpo"], groups=1, step=None, most_bytes=10**6)[0]


@pytest.fixture
def told(tmp_path):
    return folder(tmp_path, called(), answered(), failed())


def test_the_viewer_gets_the_turns(told):
    one, _, other = shown(told)["completions"]
    assert one["turns"] == [
        {"written": 2, "observed": 1, "reward": 0.5, "called": True, "failure": ""},
        {"written": 1, "observed": 0, "reward": 0.0, "called": False, "failure": ""},
    ]
    assert [turn["failure"] for turn in other["turns"]] == ["error", "timeout"]
    assert one["tokens"] == ["a", "b", "c", "d"] and one["logprobs"] == [-0.5, -0.25, None, -1.0]


def test_observed_tokens_have_no_credit(told):
    for estimate in shown(told)["estimates"]:  # as recorded, and under GRPO
        marked = [[value is None for value in values] for values in estimate["advantages"]]
        assert marked == [[False, False, True, False], [False, False], [False, True, False]]


def test_the_page_says_environment_curves_and_failures(told):
    html = page.build([told], estimators=["grpo"])
    assert re.search(r"environment</th><td>guess", html)
    assert "Mean turns of the step" in html
    assert "the environment failed on some turns: environment/errors 20.00%" in html
    assert "rewards failed" not in html


def test_without_turns_the_viewers_data_are_as_before(tmp_path):
    (one, other) = shown(folder(tmp_path, PLAIN, PLAIN))["completions"]
    assert one.keys() == other.keys() == {"reward", "parts", "finish", "length", "tokens", "logprobs", "values"}


def test_warnings_tell_rewards_from_environments():
    rows = [{"step": 1, "rewards/answer/errors": 0.5, "environment/timeouts": 0.0, "eval_environment/errors": 0.25}]
    assert list(all_warnings(rows, evaluated=0)) == [
        "rewards failed on some completions: rewards/answer/errors 50.00%",
        "the environment failed on some turns: eval_environment/errors 25.00%",
    ]


@pytest.mark.parametrize(("name", "share"), [
    ("environment/errors", True),
    ("eval_environment/call_ratio", True),
    ("environment/calls", False),
    ("environment/latency_p99_s", False),
    ("turns/mean", False),
])  # fmt: skip
def test_shares_are_given_in_percent(name, share):
    assert is_share(name) is share
