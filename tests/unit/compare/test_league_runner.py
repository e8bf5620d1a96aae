"""scripts/reproduce/league.py: which cells run in which order, and what every method of the league shares."""

import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from rltrain import cli

SCRIPTS = Path(__file__).parents[3] / "scripts" / "reproduce"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("league"), importlib.import_module("league_controls")
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in ("league", "league_controls", "league_cold_starts"):
            sys.modules.pop(name, None)


def test_required_cells_run_first_and_seed_by_seed(scripts):
    """7 methods x 4 tasks x 8 seeds = 224; the first 28 are all those of seed 0."""
    league, _ = scripts
    given = league.specification()
    every = league.cells(given)
    assert len({one.folder for one in every}) == len(every)
    assert [one.seed for one in every[:224]] == [seed for seed in range(8) for _ in range(28)]
    first = {(one.task, one.method) for one in every[:28]}
    assert first == {(task, name) for task in given["required"]["tasks"] for name in given["required"]["methods"]}
    few = league.cells(given, tasks=["mirror"], methods=["GRPO", "SPAE"], seeds=[3, 5])
    assert [(one.seed, one.method) for one in few] == [(3, "GRPO"), (3, "SPAE"), (5, "GRPO"), (5, "SPAE")]
    rates = league.cells_by_rate(given, seeds=[0])
    assert len(rates) == 4 * 2 * 3 and rates[0].folder == "forks/GRPO-0.0003-seed0"


def test_another_rate_changes_the_rate_alone(scripts):
    league, _ = scripts
    given = league.specification()
    before, after = (
        league.cell({**given, "tasks": tasks}, "forks", "SPAE", 1)
        for tasks in (given["tasks"], league.at_rate(given["tasks"], 0.5))
    )
    assert after.folder == before.folder
    assert [pair for pair in zip(before.words, after.words, strict=True) if pair[0] != pair[1]] == [
        (f"optimizer.learning_rate={float(given['tasks']['forks']['rate']):g}", "optimizer.learning_rate=0.5")
    ]
    with pytest.raises(SystemExit):
        league.main(["--rate", "0.5", "--rates"])


def test_the_methods_of_a_task_differ_in_the_estimator_alone(scripts):
    league, _ = scripts
    given, configs = league.specification(), {}
    for method in ("GRPO", "SPAE", "VinePPO", "regression"):
        configs[method] = cli.compose([*league.cell(given, "chains", method, 2).words, "run_dir=runs/x"])
    plain = configs["GRPO"]
    assert plain.batch.minibatches == 2 and plain.loss.aggregation == "token"
    for method, config in configs.items():
        assert (config.name, config.seed, config.optimizer.learning_rate) == (method, 2, 1e-4)
        changed = {} if method == "VinePPO" else {"batch": config.batch}
        for key in ("loss", "optimizer", "data", "model", "cold_start", "sampling", "evaluation", *changed):
            assert dataclasses.asdict(getattr(config, key)) == dataclasses.asdict(getattr(plain, key)), (method, key)
    vine = configs["VinePPO"].batch
    assert vine.prompts_per_step * vine.group_size < plain.batch.prompts_per_step * plain.batch.group_size


def test_a_cell_is_finished_where_this_very_command_ran(scripts, tmp_path):
    league, _ = scripts
    given = league.specification()
    one = league.cell(given, "forks", "regression / std", 0)
    assert one.folder == "forks/regression-std-seed0" and not one.finished(tmp_path)
    (tmp_path / one.folder / "checkpoints").mkdir(parents=True)
    league.conclude(one, tmp_path, 5.0)
    assert one.finished(tmp_path) and not (tmp_path / one.folder / "checkpoints").exists()
    record = json.loads((tmp_path / one.folder / league.FINISHED).read_text())
    assert (record["task"], record["method"], record["seed"]) == ("forks", "regression / std", 0)
    assert not dataclasses.replace(one, words=(*one.words, "steps=3")).finished(tmp_path)


def test_the_line_of_progress(scripts):
    """Two of four made in ten seconds by this call, after one of before: ten seconds are left for the other one."""
    league, _ = scripts
    cell = league.cell(league.specification(), "forks", "GRPO", 1)
    shown = league.Progress(total=4, done=3, made=2, started_s=time.monotonic() - 10)
    line = shown.line(cell, 4.6, failed=False)
    assert line.startswith("league 3/4  seed 1  forks  GRPO  5 s  ETA ") and len(line.rsplit(" ", 1)[1]) == 5
    assert "STOPPED" in shown.line(cell, 4.6, failed=True)


def test_a_control_counts_at_its_better_rate(scripts):
    """Better rates: 0.52, 0.54 from 0.50, 0.51. Changes of 2 and 3 points, t(0.975, 1) = 12.706, sd/sqrt(2) = 0.5."""
    _, controls = scripts
    line = controls.row("chains", [0.50, 0.51], [[0.52, 0.40], [0.50, 0.54]], [3e-4, 1.5e-3])
    assert line.startswith("| chains | 2 | 0.0003, 0.0015 | 50.5 | 53.0 | +2.5 (-3.9 to +8.9) | ")


def test_a_cold_start_is_as_good_as_its_worst_decision(scripts):
    """Means 0.85 and 0.80. The spread of 0.8, 0.9, 0.7, 0.9 is sqrt(0.0275/3) = 0.0957."""
    made = importlib.import_module("league_cold_starts")
    decisions = [torch.tensor([0.8, 0.9]), torch.tensor([0.7, 0.9])]
    assert made.row("chains", 0.85, [decisions, decisions[:1]]) == "| chains | 85 | 80.0 | 85.0 | 9.6 |"
