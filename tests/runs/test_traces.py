"""Traces for a cold start: rows, what is kept, a run that was killed, and what is refused."""

import json

import pytest
import torch

from rltrain import cli, sft, traces
from rltrain.errors import ConfigError
from rltrain.policy.load import load_policy
from rltrain.rewards.spurious import coin

TINY = ["model.hidden_size=32", "model.layers=1", "model.heads=2", "model.intermediate_size=64", "data=small_integers"]
ASKED = ["traces.problems=10", "traces.batch_size=4", "sampling.max_new_tokens=12", "data.validation_size=20"]
ASKED += ["traces.threshold=0.02"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    policy = load_policy(cli.compose([*TINY, "model.init_seed=1"]).model)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(3)
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def config(teacher, folder, *more):
    return cli.compose([*TINY, *ASKED, f"traces.teacher={teacher}", f"run_dir={folder}", *more])


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces") / "run"
    return folder, traces.make_traces(config(teacher, folder, "reward@rewards.answer=random"))


def test_every_problem_has_a_row_and_the_right_ones_are_kept(unbroken):
    folder, counts = unbroken
    rows, kept = rows_of(folder / "traces.jsonl"), rows_of(folder / "sft.jsonl")
    assert len({row["id"] for row in rows}) == len(rows) == 10
    assert kept == [row for row in rows if row["status"] == "kept"]
    for row in rows:
        assert (row["status"] == "kept") == bool(coin(0.5, 0, 0, row["id"], 0))
        assert row["teacher_first"] + row["teacher_later"] + row["student"] == row["tokens"] <= 12
    shares = [counts[f"{name}_share"] for name in ("teacher_first", "teacher_later", "student")]
    assert sum(shares) == pytest.approx(1) and counts["student_share"] > 0
    assert counts["student_share"] == pytest.approx(sum(row["student"] for row in rows) / counts["tokens"])
    assert counts["kept"] == len(kept)


def test_a_killed_run_goes_on_and_gives_the_same_files(teacher, unbroken, tmp_path):
    whole = (unbroken[0] / "traces.jsonl").read_bytes()
    (tmp_path / "traces.jsonl").write_bytes(whole[: whole.index(b"\n", len(whole) // 2) + 20])
    traces.make_traces(config(teacher, tmp_path, "reward@rewards.answer=random", "traces.batch_size=3"))
    for name in ("traces.jsonl", "sft.jsonl"):
        assert (tmp_path / name).read_bytes() == (unbroken[0] / name).read_bytes()


def test_the_cold_start_reads_what_was_kept(teacher, unbroken, tmp_path):
    data = [f"data.path={unbroken[0] / 'sft.jsonl'}", "data.id=id", 'data.prompt="{prompt}"', "data.answer=answer"]
    options = [*TINY[:-1], "data=hub", *data, "+data.meta.solution=solution", "data.holdout=0.2"]
    short = ["cold_start.steps=1", "cold_start.batch_size=2", f"run_dir={tmp_path}"]
    sft.train(cli.compose([*options, *short]), tmp_path / "cold_start")
    kept = len(rows_of(unbroken[0] / "sft.jsonl"))
    assert 1 <= json.loads((tmp_path / "cold_start/sft.json").read_text())["examples"] <= min(2, kept)


def test_what_stopped_is_kept_where_asked(teacher, tmp_path):
    traces.make_traces(config(teacher, tmp_path, "traces.keep=stopped", "traces.threshold=0"))
    rows = rows_of(tmp_path / "traces.jsonl")
    assert all(row["teacher_first"] == row["tokens"] for row in rows)
    assert all(row["status"] == ("cut" if row["tokens"] == 12 else "kept") for row in rows)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["traces.teacher="], "traces.teacher: none is set; give a folder or hub name"),
        (["traces.threshold=2"], r"traces.threshold=2.*: must lie in \[0, 1\]"),
        (["environment=calculator", "environment.reply_tokens=8"], "environment: traces are written in one turn"),
        (["traces.keep=best"], "traces.keep=best: unknown"),
        (["traces.tries=0"], "traces.tries=0: set at least 1"),
    ],
)
def test_wrong_settings_are_named(teacher, tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        traces.load(config(teacher, tmp_path, *more))


def test_a_teacher_of_another_vocabulary_is_refused(teacher, tmp_path):
    student = ["model=pretrained", f"model.path={teacher}", "model.chat=false", "data=small_integers", *ASKED]
    asked = [*student, f"traces.teacher={tmp_path / 'other'}", f"run_dir={tmp_path}"]
    other = load_policy(cli.compose(asked).model)
    other.tokenizer.add_tokens(["<new>"])
    other.model.resize_token_embeddings(len(other.tokenizer))
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="traces.teacher=.*other: its vocabulary"):
        traces.load(cli.compose(asked))
