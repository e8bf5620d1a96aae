"""The hub source on local files that have exactly the columns of GSM8K, MATH, DAPO-Math-17k and MedQA."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rltrain.data.boxed import last_boxed
from rltrain.data.hub import HubConfig, LeftOut, hub
from rltrain.errors import ConfigError

PRESETS = Path(__file__).parents[3] / "configs" / "data"

GSM8K = [
    {"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n:,}"}
    for n in range(600, 640)
]
MATH = [
    {
        "problem": f"Simplify $\\frac{{{2 * n}}}{{{2 * n + 2}}}$.",
        "level": "Level 1",
        "solution": f"Not $\\boxed{{0}}$, but $\\boxed{{\\frac{{{n}}}{{{n + 1}}}}}$.",
        "type": "Prealgebra",
    }
    for n in range(1, 41)
]
DAPO = [
    {
        "data_source": "math_dapo",
        "prompt": [{"content": f"Solve: {n} + 1\n\nRemember to put your answer on its own line.", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(n + 1), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"id-{n}"},
    }
    for n in range(40)
]
MEDQA = [
    {
        "question": f"Patient {n}: which is it?",
        "answer": f"gamma {n}",
        "options": {"A": "alpha", "B": "beta", "C": f"gamma {n}", "D": "delta"},
        "meta_info": "step1",
        "answer_idx": "C",
        "metamap_phrases": ["patient", "which"],
    }
    for n in range(40)
]
ROWS = {"gsm8k": GSM8K, "math": MATH, "dapo_math_17k": DAPO, "medqa": MEDQA}


def write(rows: list[dict], path: Path) -> Path:
    import datasets

    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.name == "splits":
        datasets.DatasetDict(
            train=datasets.Dataset.from_list(rows[:30]), test=datasets.Dataset.from_list(rows[30:])
        ).save_to_disk(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def preset(name: str, **changes) -> HubConfig:
    node = OmegaConf.load(PRESETS / f"{name}.yaml")
    assert node.pop("defaults") == ["hub", "_self_"]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(HubConfig), node, changes))
    assert isinstance(config, HubConfig)
    return config


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.json", "rows.parquet", "arrow"])
@pytest.mark.parametrize("name", ROWS)
def test_every_preset_reads_every_format_alike(tmp_path, name, file):
    path = write(ROWS[name], tmp_path / file)
    config = preset(name, path=str(path), subset=None, test_split=None, holdout=0.25)
    splits = {split: hub(config, split) for split in ("train", "validation", "test")}
    assert not any(problems.left_out for problems in splits.values())
    ids = [problem.id for problems in splits.values() for problem in problems]
    assert len(ids) == len(set(ids)) == 40
    reference = write(ROWS[name], tmp_path / "reference.jsonl")
    assert list(splits["train"]) == list(
        hub(preset(name, path=str(reference), subset=None, test_split=None, holdout=0.25), "train")
    )


def first(name: str, tmp_path: Path):
    path = write(ROWS[name], tmp_path / "splits")
    return hub(preset(name, path=str(path), subset=None, validation_split="test"), "train")[0]


def test_gsm8k_row(tmp_path):
    problem = first("gsm8k", tmp_path)
    assert problem.answer == "1,200"
    assert problem.prompt == ("What is 600 + 600?\nReason step by step, then give the final number in \\boxed{}.")
    assert problem.meta == {"solution": GSM8K[0]["answer"]}


def test_math_row(tmp_path):
    problem = first("math", tmp_path)
    assert problem.answer == r"\frac{1}{2}"
    assert problem.prompt.startswith("Simplify $\\frac{2}{4}$.\n")
    assert problem.meta == {"solution": MATH[0]["solution"], "level": "Level 1", "type": "Prealgebra"}


def test_dapo_row(tmp_path):
    path = write(DAPO * 3, tmp_path / "rows.parquet")
    problems = hub(preset("dapo_math_17k", path=str(path), holdout=0.01), "train")
    by_id = {problem.id: problem for problem in problems}
    assert by_id["id-7"].answer == "8"
    assert by_id["id-7"].prompt == [{"role": "user", "content": DAPO[7]["prompt"][0]["content"]}]
    assert {row.reason for row in problems.left_out} == {"repeated id"}
    assert len(problems.left_out) == len(by_id) == len(problems)


def test_medqa_row(tmp_path):
    problem = first("medqa", tmp_path)
    assert problem.answer == "C"
    assert problem.prompt == (
        "Patient 0: which is it?\n(A) alpha\n(B) beta\n(C) gamma 0\n(D) delta\n"
        "Reason step by step, then give the letter of the right option in \\boxed{}."
    )
    assert problem.meta == {
        "step": "step1",
        "choices": {"A": "alpha", "B": "beta", "C": "gamma 0", "D": "delta"},
    }


def test_named_splits_are_taken_whole(tmp_path):
    path = write(GSM8K, tmp_path / "splits")
    config = preset("gsm8k", path=str(path), subset=None)
    assert [problem.answer for problem in hub(config, "test")] == [f"{2 * n:,}" for n in range(630, 640)]
    train, validation = hub(config, "train"), hub(config, "validation")
    assert len(train) + len(validation) == 30
    with pytest.raises(ConfigError, match=r"data.\*_split=dev: not in .*; choose from train, test"):
        hub(preset("gsm8k", path=str(path), subset=None, test_split="dev"), "test")


def test_bad_rows_are_reported_by_id_and_left_out(tmp_path, caplog):
    rows = [
        {"id": "good", "q": "1+1", "a": "two #### 2"},
        {"id": "no answer", "q": "1+1", "a": "two"},
        {"id": "blank", "q": "  ", "a": "#### 2"},
        {"id": "missing", "q": "1+1"},
        {"id": "number", "q": 3, "a": "#### 0"},
        {"id": "good", "q": "again", "a": "#### 2"},
        {"q": "no id", "a": "#### 2"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n\n[1, 2]\n")
    config = HubConfig(path=str(path), prompt="{q}=", answer="a", answer_pattern="#### (.+)", id="id", holdout=1e-9)
    with caplog.at_level(logging.WARNING):
        problems = hub(config, "train")
    assert [(p.id, p.prompt, p.answer) for p in problems] == [("good", "1+1=", "2"), ("number", "3=", "0")]
    assert {(row.id, row.reason) for row in problems.left_out} == {
        ("no answer", "no answer in a"),
        ("blank", "empty q"),
        ("missing", "empty a"),
        ("good", "repeated id"),
        ("train-6 (no id)", "empty id"),
        ("line 8", "not JSON"),
        ("line 10", "no JSON object"),
    }
    (line,) = caplog.messages
    assert (
        "2 rows kept" in line
        and "7 left out" in line
        and "1 row (no answer): no answer in a" in line
        and "\n" not in line
    )


def test_the_warning_names_the_first_ids_only(tmp_path, caplog):
    path = write([{"q": "x", "a": ""}] * 7 + [{"q": "x", "a": "1"}] * 3, tmp_path / "rows.jsonl")
    with caplog.at_level(logging.WARNING):
        found = hub(HubConfig(path=str(path), prompt="{q}", answer="a", holdout=1e-9), "train")
    assert found.left_out[0] == LeftOut(id="train-0", reason="empty a")
    assert "7 rows (train-0, train-1, train-2, train-3, train-4, …): empty a" in caplog.messages[0]


def test_limit_takes_the_first_usable_rows(tmp_path):
    path = write(GSM8K, tmp_path / "rows.jsonl")
    everything = hub(preset("gsm8k", path=str(path), subset=None, test_split=None), "train")
    limited = hub(preset("gsm8k", path=str(path), subset=None, test_split=None, limit=5), "train")
    assert list(limited) == list(everything[:5])


def test_choices_may_be_a_list(tmp_path):
    path = write([{"q": "x", "o": ["yes", "no"], "a": "A"}] * 2, tmp_path / "rows.json")
    (problem, _) = hub(
        HubConfig(path=str(path), prompt="{q} {choices}", answer="a", choices="o", holdout=1e-9), "train"
    )
    assert problem.prompt == "x (A) yes\n(B) no"


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.parquet", "arrow"])
def test_a_missing_column_is_named_with_its_key_and_the_columns(tmp_path, file):
    path = write(GSM8K, tmp_path / file)
    with pytest.raises(
        ConfigError, match=r"data.prompt=problem: .* no column 'problem'; .* answer, question|question, answer"
    ):
        hub(HubConfig(path=str(path), prompt="{problem}"), "train")
    with pytest.raises(ConfigError, match=r"data.meta.level=difficulty: "):
        hub(HubConfig(path=str(path), prompt="{question}", meta={"level": "difficulty"}), "train")


@pytest.mark.parametrize(
    ("box", "read"), [("{Problem text}", False), ("{1}", False), ("{Größe}", True), ("\\boxed{}", True), ("{-}", True)]
)
def test_a_box_of_a_column_is_read_or_refused(tmp_path, box, read):
    row = {"q": "1+1", "answer": "2", "Problem text": "x", "1": "y", "Größe": "z", "": "index"}
    config = HubConfig(path=str(write([row], tmp_path / "rows.jsonl")), prompt="{q} " + box, holdout=1e-9)
    if read:
        assert hub(config, "train")[0].prompt == "1+1 " + box.replace("{Größe}", "z")
        return
    with pytest.raises(ConfigError) as error:
        hub(config, "train")
    assert str(error.value) == (
        f"data.prompt: {box} is not read, the name has other characters than letters, digits, _ and dots, or begins "
        "with a digit or dot; rename the column"
    )


def test_unusable_sources_are_one_line(tmp_path):
    def failure(split: str = "train", **changes) -> str:
        with pytest.raises(ConfigError) as caught:
            hub(HubConfig(prompt="{q}", **changes), split)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such file" in failure(path=str(tmp_path / "absent.jsonl"))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl: the file is empty (0 bytes)" in failure(path=str(empty))
    broken = tmp_path / "broken.json"
    broken.write_text("[1, 2")
    assert "cannot be read as json (JSONDecodeError: Expecting ',' delimiter: line 1 column 6" in failure(
        path=str(broken)
    )
    fake = tmp_path / "fake.parquet"
    fake.write_text("no parquet")
    assert "cannot be read as parquet (ArrowInvalid" in failure(path=str(fake))
    unanswered = write([{"q": "x", "answer": ""}], tmp_path / "unanswered.jsonl")
    assert "1 row (train-0): empty answer" in failure(path=str(unanswered), holdout=1e-9)
    assert "raise data.holdout or name data.test_split" in failure("test", path=str(unanswered), holdout=1e-9)
    assert "set it to null" in failure("test", path=str(unanswered), test_split="test")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({}, "data.prompt, data.messages"),
        ({"prompt": "{q}", "messages": "m"}, "data.prompt, data.messages"),
        ({"prompt": "{q}", "answer_pattern": "#### .*"}, "data.answer_pattern"),
        ({"prompt": "{q}", "answer_pattern": "((", "answer": "a"}, "data.answer_pattern"),
        ({"prompt": "{q}", "answer_pattern": "(.)", "answer_boxed": True}, "data.answer_boxed"),
        ({"prompt": "{q}\n{choices}"}, "data.choices"),
        ({"prompt": "question"}, "^data.prompt=question: reads no column, so that all prompts would be alike; write "),
        ({"prompt": "{ question }"}, "^data.prompt={ question }: reads no column"),
        ({"prompt": "{question"}, "^data.prompt={question: reads no column"),
        ({"prompt": "\\boxed{}"}, "reads no column"),
        ({"prompt": "{q}", "holdout": 0.5}, "data.holdout=0.5"),
        ({"prompt": "{q}", "limit": 0}, "data.limit=0"),
    ],
)
def test_impossible_configs_name_the_key(change, key):
    with pytest.raises(ConfigError, match=key):
        HubConfig(path="x", **change)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2", None),
        ("no box", None),
        (r"\boxed{}", ""),
        (r"\boxed{" * 10**5, None),
        ("\\boxed{3}" + "x" * 9000, None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content
