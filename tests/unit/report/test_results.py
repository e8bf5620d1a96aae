"""The report's results: intervals by hand, what changed on held-out problems, labels of groups, a folder of runs."""

import json
import math
import re

import numpy as np
import pytest

from rltrain.report import __main__ as command
from rltrain.report import curves, index, intervals
from rltrain.report.evaluation import evaluation
from rltrain.report.folder import read_run
from rltrain.report.labels import shortened
from rltrain.report.page import build
from rltrain.runs import run_folder


def test_wilson_by_hand():
    """8 of 10 at z = 1.96: (0.8 + 0.192 ± 1.96·sqrt(0.016 + 0.0096)) / 1.384."""
    found = intervals.of_mean([1.0] * 8 + [0.0] * 2)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert intervals.of_mean([1.0] * 10).low == pytest.approx(10 / (10 + 1.959964**2))
    assert intervals.of_mean([1.0]) is None


def test_other_means_and_changes_by_students_t():
    """t(0.975, 2) = 4.3027, sd 1, n 3: ± 2.4841."""
    found = intervals.of_mean([1.0, 2.0, 3.0])
    assert (found.low, found.high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-4)
    change = intervals.of_change([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
    assert (change.estimate, change.low) == pytest.approx((2, 2 - 2.4841), abs=1e-4)
    assert intervals.of_change([0.5, 1.0], [0.5, 1.0]) is None


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("eval_accuracy", True), ("eval_pass@4", True), ("frac_reward_zero_std", True), ("groups/mixed", True),
        ("completions/clipped_ratio", True), ("clip_ratio/low_mean", True), ("tempo/nonzero_td_share", True),
        ("rewards/answer/errors", True), ("reward", False), ("completions/mean_length", False), ("kl", False),
        ("rewards/answer/mean", False), ("eval_max@4", False),
    ],
)  # fmt: skip
def test_shares_are_known_by_name(name, share):
    assert curves.is_share(name) is share


def held_out_file(folder, step, rights, **columns):
    rows = [
        {"step": step, "problem_id": f"p{i}", "sample": 0, "prompt": "q", "completion": f"{step}", "answer": "1",
         "token_ids": [1] * (i + 1), "reward": right, "reward/answer": right, **columns}
        for i, right in enumerate(rights)
    ]  # fmt: skip
    run_folder.write_samples(folder, f"eval_step_{step:06d}", rows)


def written(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def evaluated(tmp_path):
    """2 of 4 right, then 3 of 4: one problem lost, two gained."""
    first = {"step": 0, "eval_accuracy": 0.5, "eval_x": 1.0, "eval_completions/mean_length": 2.5}
    folder = written(tmp_path / "run", first, first | {"step": 4, "eval_accuracy": 0.75, "eval_x": 3.0})
    held_out_file(folder, 0, [1.0, 1.0, 0.0, 0.0])
    held_out_file(folder, 4, [0.0, 1.0, 1.0, 1.0])
    return folder


def test_held_out_problems_that_turned(evaluated):
    found = evaluation(read_run(evaluated, label="run"))
    assert (found.first_step, found.last_step, found.fixed, found.broken, found.problems) == (0, 4, 2, 1, 4)
    assert [(one.name, one.first, one.last) for one in found.changes] == [
        ("eval_accuracy", 0.5, 0.75),
        ("eval_x", 1.0, 3.0),
        ("eval_completions/mean_length", 2.5, 2.5),
    ]
    assert found.main is found.changes[0]
    assert [(one.right, one.before, one.after) for one in found.examples] == [
        (True, "0", "4"),
        (True, "0", "4"),
        (False, "0", "4"),
    ]
    # Where right and wrong cannot be read off the samples, nothing is said about single problems.
    held_out_file(evaluated, 4, [0.0, 0.9, 0.9, 0.9])
    found = evaluation(read_run(evaluated, label="run"))
    assert found.fixed is None and found.changes[0].change_interval is None


def test_results_in_words(evaluated):
    accuracy, other, length = evaluation(read_run(evaluated, label="run")).changes
    low, high = 100 * (0.25 + np.array([-1, 1]) * 3.182446 * np.std([-1, 0, 1, 1], ddof=1) / 2)
    assert accuracy.change == ("+25.0 points", f"{low:+.1f} to {high:+.1f}")
    assert accuracy.before == ("50.0 %", "15.0 to 85.0")  # Wilson: 0.5 ± 1.96·sqrt(1/16 + 1.96²/64) / (1 + 1.96²/4)
    assert other.change == ("+2", "") and other.after == ("3", "")
    # Lengths 1, 2, 3, 4: sd 1.291, t 3.1824.
    assert length.before == ("2.5", "0.4457 to 4.554") and length.change == ("+0", "")


def test_several_completions_of_a_problem_count_once(tmp_path):
    folder = written(tmp_path / "run", *({"step": step, "eval_accuracy": 0.5} for step in (0, 4)))
    rows = [
        {"problem_id": p, "sample": g, "reward": float(g), "reward/answer": float(g)} for p in "abc" for g in range(2)
    ]
    for step in (0, 4):
        run_folder.write_samples(folder, f"eval_step_{step:06d}", rows)
    found = evaluation(read_run(folder, label="run"))
    # Each problem's mean is 0.5: over problems nothing varies, over completions it would.
    assert (found.changes[0].first_interval.low, found.changes[0].first_interval.high) == (0.5, 0.5)
    assert (found.problems, found.samples, found.fixed) == (3, 2, 0)


def test_abstentions_are_neither_right_nor_wrong(tmp_path):
    """1 of 3 judged, then 2 of 2. The third abstains both times, the fourth at the end."""
    folder = written(tmp_path / "run", {"step": 0, "eval_accuracy": 1 / 3}, {"step": 4, "eval_accuracy": 1.0})
    held_out_file(folder, 0, [1.0, 0.0, math.nan, 0.0])
    held_out_file(folder, 4, [1.0, 1.0, math.nan, math.nan])
    found = evaluation(read_run(folder, label="run"))
    (accuracy,) = found.changes
    assert (found.fixed, found.broken, found.problems) == (1, 0, 4)
    assert accuracy.first_interval == intervals.of_share(1 / 3, 3)
    assert accuracy.last_interval == intervals.of_share(1.0, 2)
    assert accuracy.change_interval is None  # not the same problems


def test_problems_that_count_unequally_have_no_interval(tmp_path):
    """Right of judged: 2 of 2 and 0 of 1. The recorded accuracy is 2/3, the mean over problems 1/2."""
    folder = written(tmp_path / "run", *({"step": step, "eval_accuracy": 2 / 3} for step in (0, 4)))
    rights = {"a": (1.0, 1.0), "b": (0.0, math.nan)}
    rows = [
        {"problem_id": p, "sample": g, "reward": right, "reward/answer": right, "right": right}
        for p, some in rights.items()
        for g, right in enumerate(some)
    ]
    for step in (0, 4):
        run_folder.write_samples(folder, f"eval_step_{step:06d}", rows)
    found = evaluation(read_run(folder, label="run"))
    assert found.changes[0].is_in_samples and found.changes[0].first_interval is None
    assert (found.fixed, found.broken) == (0, 0)


def test_prompts_in_labels_lose_what_all_share():
    begin, end = "You are a careful calculator.\nCompute: ", "\nGive the result in a box, please."
    assert shortened([f"{begin}1+2{end}", f"{begin}1+3{end}"]) == ["1+2", "1+3"]
    assert shortened(["11+(10-1)", "11+(3*2)"]) == ["11+(10-1)", "11+(3*2)"]
    assert shortened(["a  b\nc"] * 2) == ["a b c"] * 2
    (long,) = shortened(["x" * 50 + "y" * 50])
    assert long == "x" * 39 + "…" + "y" * 40


def titles(html):
    found = re.search(r'<script type="application/json" id="credit-data">(.*?)</script>', html)[1]
    return [group["title"] for group in json.loads(found)]


def test_groups_are_labelled_with_their_outcome_and_prompt(tmp_path):
    folder = written(tmp_path / "run", {"step": 3, "reward": 0.5})
    common = {"step": 3, "finish": "stop", "token_ids": [1], "tokens": ["a"], "completion": "a", "advantages": [0.0]}
    scores = {"1+1": (1.0, 0.0, 1.0), "2+2": (0.25, -0.5, 1.0), "3+3": (0.0, math.nan, 0.0)}
    rows = [
        common | {"problem_id": prompt, "prompt": prompt, "sample": g, "reward": score, "reward/answer": score}
        for prompt, group in scores.items()
        for g, score in enumerate(group)
    ]
    run_folder.write_samples(folder, "step_000003", rows)
    assert titles(build([folder])) == [
        "run · step 3 · rewards -0.5 to 1 · 2+2",
        "run · step 3 · 2 of 3 right · 1+1",
        "run · step 3 · 0 of 2 right, 1 abstained · 3+3",
    ]


def test_a_folder_of_runs_gives_a_page_per_run_and_an_index(evaluated, monkeypatch, capsys):
    other = written(evaluated.parent / "other", {"step": 1, "reward": 0.5})
    (other / "config.yaml").write_text("steps: 9\nseed: 7\ndata: {kind: text}\nadvantage: {kind: <b>}\n")
    monkeypatch.setattr("sys.argv", ["report", str(evaluated.parent)])
    (evaluated / "config.yaml").write_text("steps: 4\n")
    command.main()
    assert len(capsys.readouterr().out.splitlines()) == 3
    html = (evaluated.parent / "report.html").read_text()
    assert re.findall(r'<a href="([^"]+)">(.*?)</a>', html) == [
        ("other/report.html", "other"),
        ("run/report.html", "run"),
    ]
    assert all((evaluated.parent / link).exists() for link in ("other/report.html", "run/report.html"))
    assert "text, &lt;b&gt;, seed 7" in html and "1 of 9" in html and "+25.0 points" in html
    assert not re.search(r"https?://", html)


def test_the_line_of_the_index_goes_from_corner_to_corner():
    rows = [{"step": 0, "eval_accuracy": 0.25}, {"step": 5, "eval_accuracy": 0.75}, {"step": 10, "eval_accuracy": 0.5}]
    assert index.small_line(rows, "eval_accuracy") == "3.0,21.0 50.0,3.0 97.0,12.0"
    assert index.small_line(rows[:1], "eval_accuracy") == "3.0,21.0"
