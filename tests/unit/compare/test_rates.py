"""Methods at their best rates, from made numbers: the choice by hand, and that no run chooses its own rate."""

import json
import math

import numpy as np
import pytest
import yaml

from rltrain.compare.league import RECORD, LeagueRun
from rltrain.compare.rates import RatedRun, at_best_rates, at_the_end, main, mean_over_the_run, read_rated
from rltrain.errors import ConfigError

STEPS = np.array([0.0, 6.0, 12.0])


def rated(method, rate, seed, last, *, task="forks"):
    """The mean over the run is (0.2 + 2·0.2 + last)/4."""
    values = np.array([0.2, 0.2, last])
    run = LeagueRun(task=task, method=method, seed=seed, steps=STEPS, values=values, tokens=1.0)
    return RatedRun(rate=rate, run=run)


# By seed, at rates 1e-4 and 1e-3. Seeds 0 and 2 prefer 1e-3 for GRPO (0.60 to 0.40), seeds 1 and 3 prefer 1e-4.
GRPO = {1e-4: [0.4, 0.5, 0.4, 0.7], 1e-3: [0.7, 0.1, 0.5, 0.3]}
OTHER = {1e-4: [0.3, 0.3, 0.3, 0.3], 1e-3: [0.5, 0.4, 0.6, 0.6]}


def made(task="forks"):
    tables = {"GRPO": GRPO, "regression": OTHER}
    return [
        rated(method, rate, seed, last, task=task)
        for method, table in tables.items()
        for rate, of_seed in table.items()
        for seed, last in enumerate(of_seed)
    ]


def test_each_half_is_judged_at_the_rate_that_the_other_chose():
    """GRPO: seeds 0, 2 at 1e-4, seeds 1, 3 at 1e-3: 0.4, 0.1, 0.4, 0.3. The other is at 1e-3 throughout."""
    grpo, other = at_best_rates(made(), at_the_end)
    assert (grpo.chosen, other.chosen) == ((1e-3, 1e-4), (1e-3, 1e-3))
    assert grpo.scores == {0: 0.4, 1: 0.1, 2: 0.4, 3: 0.3}
    assert other.scores == {0: 0.5, 1: 0.4, 2: 0.6, 3: 0.6}
    assert grpo.by_rate == {1e-4: pytest.approx(0.5), 1e-3: pytest.approx(0.4)}
    pairs = np.array([0.1, 0.3, 0.2, 0.3])
    half = 3.182446 * pairs.std(ddof=1) / math.sqrt(4)  # t(0.975, 3)
    assert grpo.difference is None and other.difference is not None
    assert (other.difference.estimate, other.difference.low) == (pytest.approx(0.225), pytest.approx(0.225 - half))


def test_a_run_has_no_part_in_the_choice_of_its_rate():
    """Whatever seed 0 got at 1e-4, it is judged there, and so are its companions of the first half."""
    runs = [one for one in made() if (one.run.method, one.rate, one.run.seed) != ("GRPO", 1e-4, 0)]
    worse = at_best_rates([*runs, rated("GRPO", 1e-4, 0, 0.0)], at_the_end)[0]
    assert worse.scores == {0: 0.0, 1: 0.1, 2: 0.4, 3: 0.3}


def test_only_seeds_with_every_cell_count_and_equal_scores_take_the_lower_rate():
    more = [rated(method, 1e-4, 4, 0.9) for method in ("GRPO", "regression")]  # 1e-3 is missing
    assert at_best_rates([*made(), *more], at_the_end)[0].seeds == [0, 1, 2, 3]
    assert at_best_rates([one for one in made() if one.run.seed < 3], at_the_end) == []
    equal = [rated("GRPO", rate, seed, 0.5) for rate in (1e-3, 1e-4) for seed in range(4)]
    assert at_best_rates(equal, at_the_end)[0].chosen == (1e-4, 1e-4)


def test_one_command_prints_the_table(tmp_path, capsys):
    """Over the run the differences are a quarter of those at the end: 22.5 and 5.6 points."""
    for one in made("think first"):
        folder = tmp_path / "think-first" / f"{one.run.method}-{one.rate:g}-seed{one.run.seed}"
        folder.mkdir(parents=True)
        config = {"name": one.run.method, "seed": one.run.seed, "steps": 12}
        (folder / "config.yaml").write_text(
            yaml.safe_dump(config | {"batch": {"prompts_per_step": 4, "group_size": 2}})
        )
        rows = [
            {"step": int(step), "eval_accuracy": float(value)}
            for step, value in zip(STEPS, one.run.values, strict=True)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["optimizer.learning_rate=7", f"optimizer.learning_rate={one.rate:g}"]
        record = {"task": one.run.task, "method": one.run.method, "seed": one.run.seed, "words": words}
        (folder / RECORD).write_text(json.dumps(record))
    assert {one.rate for one in read_rated(tmp_path)} == {1e-4, 1e-3}
    main([str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].startswith("| think first | GRPO | 4 | 0.0001: 27.5, 0.001: 25.0 | 0.001 and 0.0001 | 22.5 | – |")
    assert "| 0.0001: 22.5, 0.001: 28.1 | 0.001 | 28.1 | **+5.6 (" in printed[3]
    assert printed[3].endswith("**+22.5 (+7.3 to +37.7)** |")
    difference = at_best_rates(read_rated(tmp_path), mean_over_the_run)[1].difference
    assert difference is not None and difference.estimate == pytest.approx(0.225 / 4)


def test_missing_cells_and_rates_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no finished cell \(league.json\); run scripts/reproduce/league.py"):
        read_rated(tmp_path)
    (tmp_path / "forks" / "GRPO-seed0").mkdir(parents=True)
    (tmp_path / "forks" / "GRPO-seed0" / RECORD).write_text(json.dumps({"words": ["seed=0"]}))
    with pytest.raises(ConfigError, match=r"its words lack optimizer.learning_rate="):
        read_rated(tmp_path)
