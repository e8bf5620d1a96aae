"""Cold starts that runs share: what the hash depends on, and which folders ``cold_start.path`` refuses."""

import dataclasses
import json

import pytest
from tiny_run import config

from rltrain.errors import ConfigError
from rltrain.runs import cold_starts

STEPS = ("cold_start.steps=3",)


def key(tmp_path, *overrides: str) -> str:
    return cold_starts.key_of(config(tmp_path / "run", *STEPS, *overrides))


@pytest.mark.parametrize(("override", "same"), [
    ("run_dir=elsewhere", True), ("steps=9", True), ("algorithm=dapo", True), ("cold_start.share=false", True),
    ("seed=1", False), ("cold_start.learning_rate=0.5", False), ("model.layers=1", False),
    ("data.max_operand=3", False),
])  # fmt: skip
def test_the_hash_is_of_what_the_weights_are_a_function_of(tmp_path, override, same):
    assert (key(tmp_path) == key(tmp_path, override)) == same


def test_a_file_that_the_config_names_is_part_of_the_hash(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    data = ["data=hub", f"data.path={tmp_path / 'rows.jsonl'}", 'data.prompt="{q}"']
    before = key(tmp_path, *data)
    assert key(tmp_path, *data) == before
    (tmp_path / "rows.jsonl").write_text("{}\n{}\n")
    assert key(tmp_path, *data) != before


def test_a_copy_is_complete_and_of_the_same_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/sft.json").write_text("{}")
    cold_starts.copied(tmp_path / "a", tmp_path / "b")
    assert cold_starts.is_complete(tmp_path / "b")
    assert (tmp_path / "a/sft.json").samefile(tmp_path / "b/sft.json")
    cold_starts.copied(tmp_path / "a", tmp_path / "b")  # there already, from another run
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def made(folder, run_config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 32}))
    (folder / "sft.json").write_text(json.dumps({"config": cold_starts.made_with(run_config)}))
    return str(folder)


def test_a_given_cold_start_is_of_the_runs_model(tmp_path):
    run_config = config(tmp_path / "run", *STEPS)
    path = made(tmp_path / "cold", run_config)
    assert str(cold_starts.checked(path, run_config)) == path
    in_bf16 = dataclasses.replace(run_config, model=dataclasses.replace(run_config.model, dtype="bfloat16"))
    assert str(cold_starts.checked(path, in_bf16)) == path  # held otherwise, the same weights
    other = config(tmp_path / "run", *STEPS, "model.layers=1", "model.chat=true")
    with pytest.raises(ConfigError, match=r"than this run's \(model.chat: False -> True, model.layers: 2 -> 1\)"):
        cold_starts.checked(path, other)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cold_start.path=.*: holds no model \(no config.json\)"):
        cold_starts.checked(str(tmp_path), config(tmp_path / "run", *STEPS))


def test_a_model_without_a_record_is_told_by_its_shape(tmp_path):
    for name, size in (("base", 32), ("cold", 64)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "qwen3", "hidden_size": size}))
    run_config = config(tmp_path / "run", f"model.path={tmp_path / 'base'}")
    with pytest.raises(ConfigError, match=r"\(hidden_size: 64 -> 32\)"):
        cold_starts.checked(str(tmp_path / "cold"), run_config)
