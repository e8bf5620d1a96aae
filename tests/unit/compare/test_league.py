"""The league's page from cells whose numbers are worked out by hand."""

import json
import math
import re

import numpy as np
import pytest
import yaml

from rltrain.compare.league import (
    BEGIN,
    BRIEF_BEGIN,
    BRIEF_END,
    END,
    RECORD,
    LeagueRun,
    brief,
    level_of,
    main,
    page,
    read_runs,
    replaced,
    standings,
    summary,
)
from rltrain.compare.statistics import detectable
from rltrain.errors import ConfigError, RunError


def made(method, seed, values, *, task="forks", tokens=100.0):
    steps = np.array([0.0, 6.0, 24.0])
    return LeagueRun(task=task, method=method, seed=seed, steps=steps, values=np.array(values), tokens=tokens)


def test_the_mean_over_a_run_weighs_by_steps():
    """0.4 to 0.6 over 6 steps, then to 0.8 over 18: (6·0.5 + 18·0.7)/24 = 0.65. 0.7 is reached half-way: step 15."""
    run = made("GRPO", 0, [0.4, 0.6, 0.8])
    assert run.mean == pytest.approx(0.65)
    assert run.steps_to(0.7) == pytest.approx(15.0)
    assert run.steps_to(0.9) is None
    assert level_of([run, made("GRPO", 1, [0.2, 0.5, 0.6])]) == pytest.approx((0.3 + 0.7) / 2)


# The last value moves the mean by 18/48 of its change: +0.08 is +0.03, and so on.
LAST = [0.08, 0.08, 0.08, 0.08, 0.08, 0.16]


def pairs():
    base = [made("GRPO", seed, [0.4, 0.6, 0.8]) for seed in range(6)]
    better = [made("TEMPO", seed, [0.4, 0.6, 0.8 + more], tokens=120.0) for seed, more in enumerate(LAST)]
    equal = [made("RLOO", seed, [0.4, 0.6, 0.8 + (-1) ** seed * 0.08]) for seed in range(6)]
    return [*base, *better, *equal]


def test_a_standing_is_the_paired_difference_with_what_could_be_found():
    """Differences 0.03 five times and 0.06: mean 0.035, sd 0.01225. Two others than the baseline: level 97.5 %."""
    rows = {row.method: row for row in standings(pairs())}
    tempo = rows["TEMPO"]
    sd = np.std([0.03] * 5 + [0.06], ddof=1)
    half = 3.1634 * sd / math.sqrt(6)  # t(0.9875, 5)
    assert tempo.difference is not None
    assert tempo.difference.estimate == pytest.approx(0.035)
    assert tempo.difference.low == pytest.approx(0.035 - half, abs=1e-5)
    assert tempo.detectable == pytest.approx(detectable(float(sd), 6, level=0.975))
    assert tempo.tokens == pytest.approx(1.2)
    assert (tempo.verdict, rows["RLOO"].verdict) == ("higher", "open")
    assert rows["GRPO"].difference is None and rows["GRPO"].mean.estimate == pytest.approx(0.65)


def test_a_ratio_of_steps_is_a_geometric_mean_over_pairs():
    """Level 0.6, which every run reaches at step 6: 1. With 0.5 and 0.7 there: at 6·0.2/0.3 = 4 and 6 + 18/3 = 12."""
    rows = {row.method: row for row in standings(pairs())}
    assert rows["TEMPO"].ratio is not None and rows["TEMPO"].ratio.estimate == pytest.approx(1.0)
    fast = [made("fast", seed, [0.4, 0.7, 0.8]) for seed in range(5)]
    slow = [made("slow", seed, [0.4, 0.5, 0.8]) for seed in range(5)]
    base = [made("GRPO", seed, [0.4, 0.6, 0.8]) for seed in range(5)]
    found = {row.method: row.ratio.estimate for row in standings([*base, *fast, *slow]) if row.ratio}
    assert found == {"fast": pytest.approx(4 / 6), "slow": pytest.approx(12 / 6)}


def test_few_pairs_decide_nothing():
    runs = [run for run in pairs() if run.seed < 4]
    assert [row.verdict for row in standings(runs)] == ["open"] * 3
    assert [row.ratio for row in standings(runs)] == [None] * 3


def test_the_page_says_what_is_told_apart_and_what_was_not_run():
    rows = standings(pairs())
    said = summary(rows)
    assert len(said) == 1
    assert re.fullmatch(
        r"- \*\*forks\*\* \(GRPO 40\.0 to 80\.0 %, 6 seeds\): Higher than GRPO: TEMPO \(\+3\.5 points\)\. "
        r"Not told apart: RLOO \(.* points\)\.",
        said[0],
    )
    text = page(rows, ["GRPO", "TEMPO", "RLOO", "SPAE"], ["forks", "mirror"])
    assert "| TEMPO | 6 | 67." in text or "| TEMPO | 6 | 68." in text
    assert "| SPAE | not run |" in text and "### Mirror\n\nNot run." in text


def test_the_brief_table_has_differences_and_what_could_be_found():
    """By hand as above: 3.5 ± 3.1634·1.2247/sqrt(6) = 1.58. The baseline's runs are all at 65.0."""
    lines = brief(standings(pairs()), ["GRPO", "TEMPO", "SPAE"], ["forks"]).splitlines()
    assert lines[1:4] == ["| method | forks |", "|---|---|", "| GRPO | 65.0 (65.0 to 65.0), 6 seeds |"]
    assert re.fullmatch(r"\| TEMPO \| \*\*\+3\.5 \(\+1\.9 to \+5\.1\)\*\*, detectable \d\.\d \|", lines[4])
    assert lines[5] == "| SPAE | not run |"


def written(folder, run):
    folder.mkdir(parents=True)
    config = {"name": run.method, "seed": run.seed, "steps": 24, "batch": {"prompts_per_step": 4, "group_size": 16}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [
        {"step": int(step), "eval_accuracy": float(value)} | ({"completions/tokens": 50.0} if step else {})
        for step, value in zip(run.steps, run.values, strict=True)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / RECORD).write_text(json.dumps({"task": run.task, "method": run.method, "seed": run.seed, "words": []}))


def test_one_command_makes_the_page_from_the_folder(tmp_path):
    for run in pairs():
        written(tmp_path / "runs" / "forks" / f"{run.method}-seed{run.seed}", run)
    (tmp_path / "runs" / "forks" / "SPAE-seed0").mkdir()  # not finished
    assert [run.tokens for run in read_runs(tmp_path / "runs")] == [100.0] * 18
    here = tmp_path / "page.md"
    here.write_text(f"# Before\n\n{BEGIN}\nstale\n{END}\n\n{BRIEF_BEGIN}\nformer\n{BRIEF_END}\n\nafter\n")
    for _ in range(2):
        main([str(tmp_path / "runs"), "--page", str(here), "--methods", "GRPO,SPAE", "--tasks", "forks,mirror"])
    assert f"{BRIEF_BEGIN}\nformer\n{BRIEF_END}" in here.read_text()
    main([str(tmp_path / "runs"), "--page", str(here), "--brief"])
    text = here.read_text()
    assert text.startswith("# Before") and text.endswith("after\n") and "stale" not in text
    assert "| method | forks |" in text and "former" not in text
    assert "Higher than GRPO: TEMPO" in text and "| SPAE | not run |" in text and "### Mirror" in text
    assert (tmp_path / "runs" / "league.png").stat().st_size > 1000


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match="holds no finished cell"):
        read_runs(tmp_path)
    with pytest.raises(ConfigError, match="lacks the lines"):
        replaced("text", "")
    written(tmp_path / "forks" / "a", made("GRPO", 0, [0.1, 0.2, 0.3]))
    (tmp_path / "forks" / "a" / "metrics.jsonl").write_text('{"step": 3, "eval_accuracy": 0.1}\n')
    with pytest.raises(RunError, match="stands at step 3 of 24"):
        read_runs(tmp_path)
