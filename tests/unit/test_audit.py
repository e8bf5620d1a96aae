"""The audit of a data set: golds, duplicates, overlap, probes, and the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rltrain.audit import (
    audit,
    check_overlap,
    cut,
    neighbour,
    ngrams,
    normal_words,
    passing,
    probe,
    rouge_l,
    simplified,
)
from rltrain.rewards.math import MathConfig
from rltrain.types import Problem


def problem(identifier, prompt, answer):
    return Problem(id=identifier, prompt=prompt, answer=answer)


WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def test_findings_of_a_small_set():
    splits = {
        "train": [
            problem("a", "What is 2 + 3?", "5"),
            problem("b", "What is 2+3", "5"),
            problem("c", "Draw it", "see figure"),
            problem("d", f"{WORDS} apples", r"\frac{1}{2}"),
        ],
        "test": [
            problem("e", "what is 2 + 3 ?", "5"),
            problem("f", f"{WORDS} pears", "x+1"),
            problem("g", "New one", "7"),
        ],
    }
    found = audit(splits, {"answer": MathConfig()})
    assert [(row.split, row.id) for row in found["golds"]] == [("train", "c")]
    assert [(row.split, row.id) for row in found["duplicates_inside"]] == [("train", "b")]
    assert [(row.split, row.id) for row in found["duplicates_across"]] == [("test", "e")]
    assert [(row.split, row.id) for row in found["overlap_13gram"]] == [("test", "e"), ("test", "f")]
    assert [row.id for row in passing(splits["train"], found["golds"], split="train")] == ["a", "b", "d"]


def test_neighbours_are_wrong_answers():
    problems = [
        problem("a", "", "5"),
        problem("b", "", r"\frac{1}{2}"),
        problem("c", "", "yes"),
        problem("d", "", "Yes"),
    ]
    assert [neighbour(problems, index) for index in range(4)] == ["6", "3/2", "5", "5"]
    assert neighbour([problem("a", "", "yes"), problem("b", "", "Yes")], 0) is None


@pytest.mark.parametrize(
    ("gold", "wrong"),
    [
        ("10-4 n", ["10-4"]),
        ("2n", ["2"]),
        ("n", []),
        ("x - 2y = 0", ["x - 2y", "0"]),
        ("y = 2x + 1", []),
        ("5", []),
        (r"5\text{ cm}", []),
        (r"$8n^{2}+72n$", ["8n^{2}+72"]),
        (r"\frac{9}{7}", []),
    ],
)
def test_answers_that_leave_out_a_part(gold, wrong):
    assert simplified(gold) == wrong


def test_golds_whose_parts_would_be_right_are_found():
    golds = ["10-4 n", "x - 2y = 0", "y = 2x+1", "notfound", "5 n^4+5 n"]
    problems = [problem(str(index), f"{index}", gold) for index, gold in enumerate(golds)]
    found = audit({"train": problems}, {"answer": MathConfig()})["golds"]
    assert [(row.id, row.why) for row in found] == [("3", "abstains: gold points elsewhere or is a placeholder")]


def test_a_small_file_is_audited(tmp_path):
    (tmp_path / "small.jsonl").write_text(json.dumps({"question": "What is 1 + 1?", "answer": "2"}) + "\n")
    command = [sys.executable, "-m", "rltrain.audit", "data=hub", f"data.path={tmp_path / 'small.jsonl'}"]
    command += ["data.prompt='{question}'", "reward@rewards.answer=boxed", f"run_dir={tmp_path / 'run'}"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert (sum(report["problems"].values()), report["abstaining"]) == (1, 0)


def test_golds_in_gsm8k_solutions_are_found_and_placed():
    splits = {"train": [problem("a", "q", "2 + 3 = <<2+3=5>>5\n#### 5")], "test": [problem("b", "r", "#### 1,000")]}
    assert audit(splits, {"answer": MathConfig(answer="gsm8k")})["golds"] == []


def test_template_shared_by_test_prompts_is_no_overlap():
    train = [problem("a", f"{WORDS} alpha", "1")]
    test = [problem("b", f"{WORDS} beta", "1"), problem("c", f"{WORDS} gamma", "1")]
    assert check_overlap(train, test, split="test") == []
    assert len(ngrams(normal_words(WORDS))) == 2


def test_cut_moves_right_to_a_blank():
    assert cut("abcd efgh ij", 0.4) == ("abcd", " efgh ij")
    assert cut("abcd efgh ij", 0.5) == ("abcd efgh", " ij")
    assert cut("abcdef", 0.5) == ("abcdef", "")


def test_rouge_l_by_hand():
    assert rouge_l("a b c d".split(), "a c d e".split()) == pytest.approx(2 * 3 / 8)
    assert rouge_l("a b".split(), "b a".split()) == pytest.approx(0.5)
    assert rouge_l([], ["a"]) == 0.0


def test_probe_tells_a_model_that_knows_the_set_from_one_that_does_not():
    problems = [
        problem("a", "Find the sum of two and three now", "5"),
        problem("b", "Find the product of six and seven", "42"),
    ]
    rest = {cut(one.prompt, 0.4)[0]: cut(one.prompt, 0.4)[1] + rf" Answer: \boxed{{{one.answer}}}" for one in problems}
    assert probe(problems, lambda texts: [rest[text] for text in texts], 0.4) == {
        "rouge_l": 1,
        "exact": 1,
        "answered": 1,
    }
    assert probe(problems, lambda texts: ["no idea"] * 2, 0.4) == {"rouge_l": 0, "exact": 0, "answered": 0}


def test_command_writes_the_report_and_fails_on_faults(tmp_path):
    rows = [{"question": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(40)]
    rows.append({"question": "What is it?", "answer": "see figure"})
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    command = [sys.executable, "-m", "rltrain.audit", "data=hub", f"data.path={tmp_path / 'train.jsonl'}"]
    command += ["data.prompt='{question}'", "reward@rewards.answer=boxed", f"run_dir={tmp_path / 'run'}"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert report["counts"] == {"golds": 1, "duplicates_inside": 0, "duplicates_across": 0, "overlap_13gram": 0}
    assert sum(report["problems"].values()) == 41
    assert "golds                1" in done.stdout


def test_signs_make_a_difference():
    splits = {"train": [problem("a", "What is 2 + 3?", "5")], "test": [problem("b", "What is 2 * 3?", "6")]}
    assert {check: len(rows) for check, rows in audit(splits, {"answer": MathConfig()}).items()} == {
        "golds": 0, "duplicates_inside": 0, "duplicates_across": 0, "overlap_13gram": 0
    }  # fmt: skip
