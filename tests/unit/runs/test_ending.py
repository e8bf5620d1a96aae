"""The last lines of a run: the table, the sentence, the problem before and after, from files written here."""

import json

import pytest

from rltrain.runs import ending, run_folder

# Three problems, one completion each: right before 1 of 3, after 2 of 3. Differences 0, 1, 0: std sqrt(1/3), n = 3.
BEFORE, AFTER = [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]


def samples(step: int, rewards: list[float]) -> list[dict]:
    return [
        {"step": step, "problem_id": f"p{i}", "prompt": f"{i}+1=\n", "completion": f"at {step}", "answer": str(i + 1),
         "reward": reward, "reward/answer": reward}
        for i, reward in enumerate(rewards)
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"step": 0, "eval_accuracy": 1 / 3, "eval_accuracy_se": 1 / 3, "eval_problems": 3.0, "eval_reward": 1 / 3},
        {"step": 1, "reward": 0.5},
        {"step": 2, "eval_accuracy": 2 / 3, "eval_accuracy_se": 1 / 3, "eval_problems": 3.0, "eval_reward": 2 / 3},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_folder.write_samples(tmp_path, "eval_step_000000", samples(0, BEFORE))
    run_folder.write_samples(tmp_path, "eval_step_000002", samples(2, AFTER))
    return tmp_path


def test_the_last_lines(folder):
    assert ending.last_lines(folder).splitlines() == [
        "held-out, n = 3                step 0           step 2            change",
        "accuracy              0.3333 ± 0.3333  0.6667 ± 0.3333  +0.3333 ± 0.3333",
        "reward                         0.3333           0.6667           +0.3333",
        "",
        "The held-out accuracy rose by 0.3333 over 2 steps, no more than two standard",
        "errors (0.3333 each, of the difference on the same problems).",
        "",
        "The first held-out problem whose reward rose (1 rose, 0 fell), answer 2: 1+1=",
        "  step 0      reward 0      at 0",
        "  step 2      reward 1      at 2",
        "",
        f"next: python -m rltrain.report {folder}",
        f"run folder: {folder}",
    ]
    assert (folder / "learning_curve.png").exists()


def test_two_abstentions_are_no_change(folder):
    for step in (0, 2):
        run_folder.write_samples(folder, f"eval_step_{step:06d}", samples(step, [float("nan"), 0.0, float(step > 0)]))
    assert "whose reward rose (1 rose, 0 fell), answer 3: 2+1=" in ending.last_lines(folder)


def test_the_more_frequent_change_is_shown(folder):
    for step, rewards in ((0, [0.0, 1.0, 1.0]), (2, [1.0, 0.0, 0.0])):
        run_folder.write_samples(folder, f"eval_step_{step:06d}", samples(step, rewards))
    assert "whose reward fell (1 rose, 2 fell), answer 2: 1+1=" in ending.last_lines(folder)


def test_where_no_reward_changed_the_first_problem_is_shown(folder):
    run_folder.write_samples(folder, "eval_step_000002", samples(2, BEFORE))
    lines = ending.last_lines(folder).splitlines()
    start = lines.index("The first held-out problem, answer 1: 0+1=")
    assert lines[start + 1 : start + 3] == ["  step 0      reward 1      at 0", "  step 2      reward 1      at 2"]


def test_an_accuracy_that_the_samples_do_not_give_has_no_paired_error(folder):
    """As of a reward that knows better what is right than 'at least 1'."""
    text = (folder / "metrics.jsonl").read_text().replace(f'"eval_accuracy": {2 / 3},', '"eval_accuracy": 0.9,')
    (folder / "metrics.jsonl").write_text(text)
    assert "rose by 0.5667 over 2 steps." in ending.last_lines(folder)


@pytest.mark.parametrize(("change", "words"), [
    (0.0, "did not change over 4 steps."), (-0.25, "fell by 0.2500 over 4 steps, more than two standard errors"),
])  # fmt: skip
def test_the_sentence(change, words):
    first, last = {"step": 0, "eval_accuracy": 0.5}, {"step": 4, "eval_accuracy": 0.5 + change}
    assert words in ending.sentence(first, last, error=0.1).replace("\n", " ")


def test_without_an_evaluation(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    assert ending.last_lines(tmp_path).startswith("no evaluation was run")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval_abstained": 1.0, "eval_problems": 0.0}\n')
    assert ending.last_lines(tmp_path).startswith("every held-out completion abstained, so there is no accuracy")


def test_accuracy_is_the_share_of_right_completions():
    rows = [{"problem_id": "a", "reward/answer": score} for score in (1.0, 0.99, float("nan"), 1.0)]
    assert ending.accuracy_by_problem(rows) == {"a": 0.5}
