"""The compression pipeline: rows, what is kept, and a run that was killed."""

import json

import pytest
from small_runs import COMPRESSION

from rltrain import cli, compress, sft, trainer
from rltrain.errors import ConfigError
from rltrain.policy.load import load_policy
from rltrain.registry import part_of
from rltrain.rewards.spurious import coin

TINY = ["data.steps=[1]", "data.max_operand=2", "compress.problems=24", "compress.batch_size=5"]
# So small a model solves nothing: a keyed coin is the verifier, and the test knows how it falls.
TINY += ["sampling.max_new_tokens=32", "compress.max_answer_tokens=12", "reward@compress.verifier=random"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model that has learnt to write between tags."""
    folder = tmp_path_factory.mktemp("start") / "run"
    cold = ["cold_start.steps=60", "cold_start.learning_rate=5e-3", "cold_start_data.tasks=[compress]", "steps=0"]
    cold += ["cold_start_data.steps=[1]", "cold_start_data.max_operand=2", "cold_start_data.keep=0"]
    trainer.fit(cli.compose([*COMPRESSION, *TINY, *cold, f"run_dir={folder}"]))
    return folder / "cold_start"


def config(start, folder, *overrides):
    return cli.compose([*COMPRESSION, *TINY, f"model.path={start}", f"run_dir={folder}", *overrides])


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compress") / "run"
    return folder, compress.compress(config(start, folder))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_trace_has_a_row_and_the_right_ones_are_kept(unbroken):
    folder, counts = unbroken
    rows = rows_of(folder / "compressed.jsonl")
    assert len(rows) == len({row["id"] for row in rows}) == 24
    kept = rows_of(folder / "sft.jsonl")
    assert kept == [row for row in rows if row["status"] == "kept"]
    assert kept
    for row in rows:
        if row["status"] != "no trace":
            assert (row["status"] == "kept") == bool(coin(0.5, 0, 0, row["id"], 0))
    for row in kept:  # a character is a token
        assert len(row["original_solution"]) - len(row["solution"]) == row["original_tokens"] - row["compressed_tokens"]
    assert counts["dropped_share"] == pytest.approx(1 - len(kept) / 24)
    assert counts["compressed_tokens"] == pytest.approx(sum(row["compressed_tokens"] for row in kept) / len(kept))


def test_answers_are_begun_where_asked_for(start, unbroken, tmp_path):
    compress.compress(config(start, tmp_path, "compress.problems=6", "compress.begin_answer=false"))
    begun, free = (rows_of(folder / "compressed.jsonl") for folder in (unbroken[0], tmp_path))
    begun, free = ([row["solution"] for row in rows if row["status"] != "no trace"] for rows in (begun, free))
    assert begun and all(one.count("\n\\boxed{") == 1 for one in begun)
    assert free and not any("\n\\boxed{" in one for one in free)


def test_a_killed_run_goes_on_and_gives_the_same_files(start, unbroken, tmp_path):
    whole = (unbroken[0] / "compressed.jsonl").read_bytes()
    cut = whole.index(b"\n", len(whole) // 2) + 20  # in the middle of a line
    (tmp_path / "compressed.jsonl").write_bytes(whole[:cut])
    (tmp_path / "compress.json").write_bytes((unbroken[0] / "compress.json").read_bytes())
    compress.compress(config(start, tmp_path))
    for name in ("compressed.jsonl", "sft.jsonl"):
        assert (tmp_path / name).read_bytes() == (unbroken[0] / name).read_bytes()


def test_rows_of_another_config_are_refused(start, unbroken):
    with pytest.raises(ConfigError, match=r"compress.temperature: 1.0 -> 0.5"):
        compress.compress(config(start, unbroken[0], "compress.temperature=0.5"))


def test_the_kept_rows_are_a_data_set_for_sft(start, unbroken):
    of_conmax = ("+experiment", "data@cold_start_data", "cold_start_data.")
    overrides = [one for one in COMPRESSION if not one.startswith(of_conmax)]
    overrides += ["data=hub", f"data.path={unbroken[0] / 'sft.jsonl'}", "data.prompt='{prompt}'", "data.id=id"]
    overrides += ["+data.meta.solution=solution", "data.holdout=1e-6", "batch.token_budget=2048"]
    run_config = cli.compose(overrides)
    policy = load_policy(run_config.model)
    problems = part_of(run_config.data).function(run_config.data, "train")
    rows = sft.examples(list(problems), policy, run_config)
    kept = rows_of(unbroken[0] / "sft.jsonl")
    texts = [policy.tokenizer.decode(row["input_ids"]) for row in rows]
    assert texts == [row["prompt"] + row["solution"] + "<eos>" for row in kept]


def test_no_verifier_is_a_config_error(start, tmp_path):
    run_config = config(start, tmp_path)
    run_config.compress.verifier = None
    with pytest.raises(ConfigError, match=r"choose one, for example reward@compress.verifier=boxed"):
        compress.compress(run_config)
