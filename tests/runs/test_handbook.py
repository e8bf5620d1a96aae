"""rltrain handbook: extraction, traces with a handbook, a command that was killed, and a run's prompts and metrics."""

import json

import pytest
import torch
from tiny_run import config as tiny_config
from tiny_run import metrics

from rltrain import trainer
from rltrain.commands import handbook as command
from rltrain.config import ConfigError, RunError
from rltrain.data.handbook import read
from rltrain.rewards.spurious import coin
from rltrain.runs import run_folder

# A random model writes no behaviour: a line of any form whose first two letters are the name counts here.
ANY = r"handbook.line='\W*(?P<name>\w{1,2})(?P<instruction>.+)'"
ASKED = ["handbook.problems=7", "handbook.max_new_tokens=24", "data.handbook_tag=steps", "rollout.check_steps=0"]
ASKED += ["handbook.reflect='{question}{solution}'", "handbook.extract='{question}{solution}{reflection}'"]


def config(folder, *more):
    return tiny_config(folder, *ASKED, "handbook.keep=all", "sampling.max_new_tokens=40", ANY, *more)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("handbook")
    with torch.no_grad():
        command.extract(config(folder, "handbook.samples=4", "model.init_seed=3"), None)
    return folder


def test_each_problem_has_a_row_and_the_entries_name_their_origins(unbroken):
    rows = rows_of(unbroken / "extraction.jsonl")
    assert len({row["id"] for row in rows}) == len(rows) == 7
    found = {(name, row["id"]) for row in rows for name, _ in row.get("entries", [])}
    head, *entries = rows_of(unbroken / "handbook.jsonl")
    assert set(head["tags"]) <= {"2", "3"}
    assert {(entry["name"], origin["problem"]) for entry in entries for origin in entry["origins"]} == found
    assert all(origin["run"] == str(unbroken) for entry in entries for origin in entry["origins"])
    assert len(read(unbroken / "handbook.jsonl", "data.handbook").behaviours) == len(entries) >= 1


def test_a_killed_extraction_goes_on_and_gives_the_same_files(unbroken, tmp_path):
    for name in ("extraction.json", "extraction.jsonl"):
        text = (unbroken / name).read_text()
        (tmp_path / name).write_text(text.replace(str(unbroken), str(tmp_path)))
    whole = (tmp_path / "extraction.jsonl").read_bytes()
    (tmp_path / "extraction.jsonl").write_bytes(whole[: whole.index(b"\n", len(whole) // 2) + 20])
    command.extract(config(tmp_path, "handbook.samples=4", "model.init_seed=3"), None)
    assert (tmp_path / "extraction.jsonl").read_bytes() == whole
    assert (tmp_path / "handbook.jsonl").read_text() == (unbroken / "handbook.jsonl").read_text().replace(
        str(unbroken), str(tmp_path)
    )
    with pytest.raises(ConfigError, match=r"made with another config \(handbook.samples: 4 -> 1"):
        command.extract(config(tmp_path, "model.init_seed=3"), None)


def sample_row(name, step, *, right, finish="stop"):
    return {"step": step, "problem_id": name, "sample": 0, "completion": f"of step {step}", "finish": finish,
            "reward": right, "right": right, "token_ids": [5, 6]}  # fmt: skip


def test_a_run_s_newest_right_samples_are_read(tmp_path):
    made = config(tmp_path / "out", "handbook.keep=right")
    problems = command.problems_of(made.data, "train")
    names = [problems[i].id for i in range(4)]
    run_folder.write_samples(
        tmp_path, "step_000002",
        [sample_row(names[0], 2, right=1.0), sample_row(names[1], 2, right=1.0), sample_row(names[2], 2, right=0.0)],
    )  # fmt: skip
    run_folder.write_samples(
        tmp_path, "step_000004",
        [sample_row(names[1], 4, right=1.0), sample_row(names[3], 4, right=1.0, finish="length")],
    )  # fmt: skip
    run_folder.write_samples(tmp_path, "eval_step_000004", [sample_row(names[3], 4, right=1.0)])
    found = command.recorded(tmp_path, made, problems)
    assert [(each.problem.id, each.text) for each in found] == [(names[0], "of step 2"), (names[1], "of step 4")]
    with pytest.raises(ConfigError, match="none is in data's train split; give the run's own experiment"):
        command.recorded(tmp_path, made, [problems[2]])
    with pytest.raises(ConfigError, match="has no training samples; give a run folder"):
        command.recorded(tmp_path / "out", made, problems)
    with pytest.raises(RunError, match="2 answers hold no behaviour; read .*extraction.jsonl, then change"):
        command.extract(config(tmp_path / "out", "handbook.keep=right", r"handbook.line='(?P<name>)(?P<instruction>)'"),
                        tmp_path)  # fmt: skip
    rows = rows_of(tmp_path / "out/extraction.jsonl")
    assert [row["origin"]["step"] for row in rows] == [2, 4] and rows[1]["solution"] == "of step 4"
    assert all(why in ("no behaviour", "cut") for row in rows for _, why in row["refused"])


@pytest.fixture(scope="module")
def handbook(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "handbook.jsonl"
    path.write_text('{"tags": ["2"]}\n{"name": "a", "instruction": "#!", "tags": ["2"]}\n')
    return [f"data.handbook={path}", "data.handbook_tag=steps", "data.handbook_template='{behaviours}{question}'",
            "data.handbook_entry='{instruction}'"]  # fmt: skip


def test_traces_are_written_with_the_handbook_and_read_without_it(handbook, tmp_path):
    # Completions of one token that may be any: the end of a text is likelier with many samples.
    short = ["sampling.max_new_tokens=40", "handbook.samples=3", "handbook.problems=8", "handbook.keep=right"]
    command.traces(tiny_config(tmp_path, *ASKED, *handbook, *short))
    rows, kept = rows_of(tmp_path / "handbook_traces.jsonl"), rows_of(tmp_path / "sft.jsonl")
    assert kept == [row for row in rows if row["status"] == "kept"] and len(rows) == 8 and kept
    assert not any("#!" in row["prompt"] for row in kept)
    for row in kept:
        has_entry = "-2-" in row["id"]  # integers-train-SEED-STEPS-INDEX
        assert row["handbook_tokens"] == 2 * has_entry and row["behaviours"] == ["a"] * has_entry
        assert any(coin(0.5, 0, 0, row["id"], sample) for sample in range(3))


def test_traces_without_a_solution_are_named(handbook, tmp_path):
    never = ["rewards.answer.probability=0", "handbook.problems=2", "sampling.max_new_tokens=4"]
    with pytest.raises(RunError, match=r"of 2 problems none has a solution that is kept \(2 "):
        command.traces(tiny_config(tmp_path, *ASKED[1:], *handbook, *never))


def test_a_run_has_the_entries_in_its_prompts_and_their_tokens_in_its_metrics(handbook, tmp_path):
    with torch.enable_grad():
        trainer.fit(
            tiny_config(tmp_path, *handbook, "steps=1", "evaluation.every_steps=1", "tracking.samples_every_steps=1")
        )
    import pyarrow.parquet as pq

    rows = pq.read_table(tmp_path / "samples/step_000001.parquet").to_pylist()
    share = sum(row["prompt"].startswith("#!") for row in rows) / len(rows)
    assert all(row["prompt"].startswith("#!") == ("-2-" in row["problem_id"]) for row in rows) and 0 < share < 1
    last = metrics(tmp_path)[-1]
    assert (last["handbook/tokens"], last["handbook/entries"]) == (pytest.approx(2 * share), pytest.approx(share))
    assert last["eval_handbook/tokens"] == 1  # of two problems one has two operators
