"""One problem, many groups (1-shot RLVR): every group is a fresh draw, on any number of ranks."""

import json

import pyarrow.parquet as pq
import pytest
from tiny_run import config
from two_ranks import train

from rltrain import trainer

GROUPS, GROUP_SIZE = 16, 4


@pytest.fixture
def one_shot(tmp_path):
    row = {"question": "12+7=", "answer": "19"}
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
    return [
        "data=hub",
        f"data.path={tmp_path / 'one.jsonl'}",
        "data.prompt='{question}'",
        "data.holdout=0.01",
        f"batch.prompts_per_step={GROUPS}",
        f"batch.group_size={GROUP_SIZE}",
        "batch.token_budget=2048",
        "evaluation.every_steps=0",
        "tracking.samples_every_steps=1",
        "steps=1",
    ]


def completions(run_dir) -> list[tuple[int, ...]]:
    rows = pq.read_table(run_dir / "samples" / "step_000001.parquet").to_pylist()
    assert {row["prompt"] for row in rows} == {"12+7="}
    return [tuple(row["token_ids"]) for row in rows]


def test_sixteen_groups_of_one_problem_are_sixteen_draws(one_shot, tmp_path):
    trainer.fit(config(tmp_path / "run", *one_shot))
    drawn = completions(tmp_path / "run")
    assert len(drawn) == GROUPS * GROUP_SIZE
    # 10 tokens of a vocabulary of about 100: two equal draws are rarer than 1e-6.
    assert len(set(drawn)) == GROUPS * GROUP_SIZE

    ranks = train(tmp_path / "two", 2, *one_shot)
    assert ranks.returncode == 0, ranks.stderr
    assert completions(tmp_path / "two") == drawn
