"""Comparisons of several seeds: the numbers by hand and by other ways of computing, and folders that are not whole."""

import itertools
import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_run import config as tiny_config

from rltrain import trainer
from rltrain.compare.__main__ import main
from rltrain.compare.comparison import compare
from rltrain.compare.folders import Curve, read
from rltrain.compare.picture import band
from rltrain.compare.statistics import (
    Interval,
    bootstrap,
    bootstrap_higher,
    detectable,
    interquartile_mean,
    paired,
    probability_higher,
)
from rltrain.compare.words import sentence, sentences
from rltrain.errors import ConfigError, RunError

ROOT = Path(__file__).parents[3]
# Two tasks (columns), five runs (rows).
X = np.array([[0.80, 0.60], [0.71, 0.52], [0.76, 0.58], [0.79, 0.66], [0.78, 0.41]])
Y = np.array([[0.83, 0.59], [0.75, 0.50], [0.75, 0.62], [0.82, 0.67], [0.80, 0.44]])


# --- statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([7.0], 7.0),
        ([1.0, 2.0, 6.0], 3.0),  # under four nothing is cut
        ([1.0, 2.0, 3.0, 4.0, 100.0], 3.0),  # floor(5/4) = 1 from either end
        ([9.0, -50.0, 4.0, 1.0, 5.0, 2.0, 80.0, 3.0], 3.5),  # sorted -50 1 | 2 3 4 5 | 9 80
    ],
)
def test_interquartile_mean(scores, expected):
    assert interquartile_mean([np.array(scores)]) == expected
    half = len(scores) // 2
    assert interquartile_mean([np.array(scores[:half]), np.array(scores[half:])]) == expected


def test_statistics_are_those_of_rliable():
    """Values of rliable 1.2.0: aggregate_iqm, probability_of_improvement, and its intervals with 20,000 resamples."""
    iqm = bootstrap(list(X.T), interquartile_mean, level=0.95)
    assert iqm.estimate == pytest.approx(0.68166667, abs=1e-8)
    assert [iqm.low, iqm.high] == pytest.approx([0.63333333, 0.71166667], abs=0.004)
    higher = bootstrap_higher(list(Y.T), list(X.T), level=0.95)
    assert higher.estimate == pytest.approx(0.61, abs=1e-12)
    assert [higher.low, higher.high] == pytest.approx([0.33975, 0.86], abs=0.03)


def test_probability_higher_counts_ties_half_and_averages_tasks():
    # 1>2 no, 1>0 yes, 2=2 half, 2>0, 3>2, 3>0: 4.5 of 6
    first = (np.array([1.0, 2.0, 3.0]), np.array([2.0, 0.0]))
    assert probability_higher([first]) == 0.75
    assert probability_higher([first, (np.array([1.0]), np.array([1.0]))]) == (0.75 + 0.5) / 2


def test_bootstrap_against_all_resamples():
    scores = np.array([0.0, 3.0, 6.0])
    means = np.sort([np.mean(one) for one in itertools.product(scores, repeat=3)])
    # Of 27 equally likely resamples, 1 has mean 0 and 3 have mean 1: the tenth percentile is 1 (and the ninetieth 5).
    assert list(means[:5]) == [0, 1, 1, 1, 2]
    assert bootstrap([scores], interquartile_mean, level=0.8) == Interval(estimate=3.0, low=1.0, high=5.0)


def test_strata_are_resampled_apart():
    """A mixture of the two constants would vary; within each stratum nothing does."""
    strata = [np.array([1.0, 1.0]), np.array([5.0, 5.0])]
    assert bootstrap(strata, interquartile_mean, level=0.95) == Interval(estimate=3.0, low=3.0, high=3.0)


def test_paired_interval():
    # mean 3, sd sqrt(2.5), t(0.975; 4) = 2.776445: half-width 2.776445·1.581139/2.236068
    found = paired(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), level=0.95)
    assert found.estimate == 3.0
    assert [found.low, found.high] == pytest.approx([3 - 1.963243, 3 + 1.963243], abs=1e-6)
    assert found.excludes_zero
    assert paired(np.array([1.0]), level=0.95) is None
    assert not paired(np.zeros(5), level=0.95).excludes_zero


@pytest.mark.parametrize(("count", "critical"), [(5, 2.776445), (10, 2.262157)])
def test_detectable_difference_has_power_of_80_percent(count, critical):
    """P(T > t) = integral over s of P(Z > t·s - d·sqrt(n)) against the density of s = sqrt(chi2/df)."""
    freedom = count - 1
    shift = detectable(2.0, count, level=0.95) / 2.0 * math.sqrt(count)
    s = np.linspace(1e-6, 6, 20001)
    log_density = math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
    density = np.exp(log_density + (freedom - 1) * np.log(s) - freedom * s**2 / 2)
    above = np.array([math.erfc((critical * one - shift) / math.sqrt(2)) / 2 for one in s])
    assert np.trapezoid(density * above, s) == pytest.approx(0.8, abs=1e-5)


# --- the comparison ----------------------------------------------------------------------------------------------


def curve(method, seed, values, *, completions=(0, 100, 200), seconds=(0, 10, 20), task="", **rest):
    points = {"completions": np.array(completions, float), "seconds": np.array(seconds, float)}
    return Curve(
        folder=f"{method}{seed}", method=method, task=task, seed=seed, values=np.array(values), **points, **rest
    )


def test_views_by_hand():
    """b is slower per completion: at 20 s it stands at 100 completions; a needs 50 and 100 completions to 0.4."""
    a = [curve("a", 0, [0.2, 0.6, 0.8]), curve("a", 1, [0.2, 0.4, 0.6])]
    b = [curve("b", seed, [0.2, 0.5, end], seconds=(0, 20, 40)) for seed, end in ((0, 0.9), (1, 0.8))]
    found = compare([*a, *b], metric="accuracy")
    assert (found.baseline, found.level) == ("a", 0.95)
    assert (found.completions, found.seconds) == (200, 20)
    # Half-way from the baseline's start to its end: (0.2 + 0.8)/2 and (0.2 + 0.6)/2, in the mean 0.45.
    assert found.reach == pytest.approx(0.45)
    samples, wall_clock, _ = found.views
    assert [score.mean for score in samples.scores] == pytest.approx([0.7, 0.85])
    assert samples.differences[0].pairs == pytest.approx([0.1, 0.2])
    assert samples.differences[0].probability_higher.estimate == 0.875  # 0.9 over both, 0.8 over one and equal to one
    assert [score.mean for score in wall_clock.scores] == pytest.approx([0.7, 0.5])
    assert wall_clock.differences[0].pairs == pytest.approx([-0.3, -0.1])


def test_completions_to_a_level_and_runs_that_never_reach_it():
    runs = [curve("a", 0, [0.2, 0.6, 0.8]), curve("a", 1, [0.2, 0.3, 0.5]), curve("b", 0, [0.5, 0.6, 0.7])]
    assert [one.completions_to(0.4) for one in runs] == pytest.approx([50, 150, 0])
    view = compare([*runs, curve("b", 1, [0.2, 0.2, 0.3])], metric="accuracy", reach=0.4).views[2]
    assert [(score.method, score.reached, score.runs) for score in view.scores] == [("a", 2, 2), ("b", 1, 2)]
    assert view.scores[1].mean == 100  # (0 + the budget of 200)/2
    assert view.differences[0].pairs == pytest.approx([-50, 50])


def test_a_level_below_the_start_is_reached_from_above():
    """Such as a length that falls: 10 to 8 at 100, to 6 at 200."""
    runs = [curve("a", 0, [10, 8, 6]), curve("b", 0, [10, 6, 9]), curve("b", 1, [10, 9, 9])]
    assert [one.completions_to(7, falling=True) for one in runs] == [150, 75, None]
    view = compare(runs, metric="length", reach=7).views[2]
    assert [(score.mean, score.reached) for score in view.scores] == [(150, 1), ((75 + 200) / 2, 1)]


def test_a_longer_run_is_cut_to_the_shortest():
    """What comes after the common budget is not counted, neither in the score nor as reaching the level."""
    longer = curve("b", 0, [0.0, 0.2, 1.0], completions=(0, 200, 400), seconds=(0, 20, 40))
    found = compare([curve("a", 0, [0.0, 0.1, 0.2]), longer], metric="accuracy", reach=0.5)
    assert [score.mean for score in found.views[0].scores] == pytest.approx([0.2, 0.2])
    assert [score.reached for score in found.views[2].scores] == [0, 0]
    assert [score.mean for score in found.views[2].scores] == [200, 200]


def test_three_methods_share_the_error_rate():
    found = compare([curve(m, s, [0, 0, s * k]) for k, m in enumerate("abc", 1) for s in range(5)], metric="accuracy")
    assert found.level == pytest.approx(0.975)
    # c - a: 0 2 4 6 8, mean 4, sd sqrt(10), t(0.9875; 4) = 3.495406
    assert found.views[0].differences[1].mean.high == pytest.approx(4 + 3.495406 * math.sqrt(10 / 5), abs=1e-5)


def test_pairs_are_of_one_task_and_seed():
    runs = [curve(m, s, [0, 0, v], task=t) for m, s, t, v in [("a", 0, "x", 1), ("a", 0, "y", 2), ("b", 0, "y", 5)]]
    found = compare([*runs, curve("b", 1, [0, 0, 7], task="x")], metric="accuracy")
    assert found.views[0].differences[0].pairs == [3.0]
    assert any("different seeds; 1 are shared" in note for note in found.notes)


def test_bands_are_of_the_points_that_all_runs_have():
    own = [curve("a", 0, [0, 0.5, 1]), curve("a", 1, [0, 0.5], completions=(0, 50), seconds=(0, 5))]
    grid, estimate, low, high = band(own, "completions")
    assert list(grid) == [0, 50]
    assert list(estimate) == [0, 0.375]
    assert (low[1], high[1]) == (0.25, 0.5)


# --- what is said ------------------------------------------------------------------------------------------------


def said(differences):
    runs = [curve("a", seed, [0.5, 0.5, 0.5]) for seed in range(len(differences))]
    runs += [curve("b", seed, [0.5, 0.5, 0.5 + one]) for seed, one in enumerate(differences)]
    found = compare(runs, metric="accuracy")
    return sentence(found.views[0], found.views[0].differences[0], found.level)


def test_a_direction_is_named_only_where_the_interval_excludes_zero():
    # Mean 0.03, half-width 0.01963 as above.
    assert said([0.01, 0.02, 0.03, 0.04, 0.05]) == (
        "accuracy after 200 completions, b minus a: +0.030, 95 % interval +0.010 to +0.050, 5 pairs. "
        "Higher: the interval excludes zero."
    )
    assert "Lower: the interval excludes zero." in said([-0.01, -0.02, -0.03, -0.04, -0.05])
    undecided = said([-0.04, 0.06, 0.01, -0.02, 0.03])
    assert "No difference is shown, nor that there is none" in undecided
    assert not {"Higher", "Lower", "better"} & set(undecided.replace(":", " ").split())


def test_few_pairs_decide_nothing():
    assert said([0.30, 0.31, 0.32, 0.30]).endswith("this decides nothing, whichever way it points.")
    assert "1 shared seeds give no interval; nothing is shown." in said([0.3])


def test_one_method_is_no_comparison():
    assert sentences(compare([curve("a", 0, [0, 1, 2])], metric="accuracy")) == [
        "There is one method only: nothing is compared."
    ]


def test_notes_name_what_else_differs():
    plain = {"advantage": {"kind": "a"}, "loss": {"clip_high": 0.2}, "seed": 0, "run_dir": "x"}
    other = {"advantage": {"kind": "b"}, "loss": {"clip_high": 0.28}, "seed": 0, "run_dir": "y"}
    warmer = {**plain, "optimizer": {"learning_rate": 1}, "seed": 1}
    runs = [curve("a", 0, [0.1, 0.2, 0.3], config=plain), curve("a", 1, [0.1, 0.2, 0.3], config=warmer)]
    notes = compare([*runs, curve("b", 0, [0.2, 0.2, 0.3], config=other)], metric="accuracy").notes
    assert notes == [
        "the methods have different seeds; 1 are shared by all, pairs use shared ones alone",
        "seeds 0: the methods differ before step 1, so they share no cold start",
        "a: its runs also differ in optimizer.learning_rate",
        "the methods differ in advantage.kind, loss.clip_high",
    ]


# --- folders -----------------------------------------------------------------------------------------------------


def write_run(folder, *, seed=0, kind="a", steps=4, rows=None):
    folder.mkdir(parents=True)
    batch = {"prompts_per_step": 3, "group_size": 2}
    settings = {"name": "n", "seed": seed, "steps": steps, "batch": batch, "advantage": {"kind": kind, "eps": 1.0}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    if rows is None:
        rows = [{"step": 0, "eval_accuracy": 0.1}]
        rows += [{"step": s, "timing_s/step": 2.0} for s in range(1, steps)]
        rows += [{"step": steps, "timing_s/step": 2.0, "eval_accuracy": 0.5, "eval_completions/mean_length": 7.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def read_all(*paths, **options):
    return read(paths, by=["advantage"], metric="eval_accuracy", **options)


def test_a_run_folder_as_a_curve(tmp_path):
    """Dynamic sampling draws again: 6 completions a try, 1, 3, 1 and 2 tries."""
    steps = [
        {"step": step, "timing_s/step": seconds, "dynamic_sampling/attempts": tries}
        for step, seconds, tries in ((1, 1.0, 1), (2, 2.0, 3), (3, 1.5, 1), (4, 9.0, 2))
    ]
    steps[1] |= {"eval_accuracy": 0.3, "completions/mean_length": 5.0}
    steps[2] |= {"timing_s/step": 31.5, "timing_s/checkpoint": 30.0}  # saving is no training
    steps[3] |= {"eval_accuracy": 0.4}
    write_run(tmp_path / "r", rows=[{"step": 0, "eval_accuracy": 0.1}, *steps], seed=3, kind="tree")
    (found,) = read_all(tmp_path).curves
    assert (found.method, found.seed) == ("tree", 3)
    assert list(found.completions) == [0, 24, 42]
    assert list(found.seconds) == [0, 3, 13.5]
    assert list(found.values) == [0.1, 0.3, 0.4]
    assert (found.step_s, found.length_tokens) == (1.75, 5.0)


def test_what_is_not_whole_is_left_out_with_a_note(tmp_path):
    write_run(tmp_path / "whole")
    write_run(tmp_path / "again")
    write_run(tmp_path / "running", seed=1, steps=9, rows=[{"step": 0, "eval_accuracy": 0.1}, {"step": 4}])
    write_run(tmp_path / "blind", seed=2, rows=[{"step": 4, "reward": 1.0}])
    (write_run(tmp_path / "torn", seed=3) / "config.yaml").write_text("seed: [")
    (write_run(tmp_path / "empty", seed=4) / "config.yaml").write_text("")
    (tmp_path / "nothing").mkdir()
    reading = read_all(tmp_path, tmp_path / "nothing")
    assert [one.folder.name for one in reading.curves] == ["again"]
    whys = {note.split(":")[0].split("/")[-1]: note.split(":", 1)[1] for note in reading.notes}
    assert whys["running"] == " left out, stands at step 4 of 9 (--partial keeps it)"
    assert whys["blind"] == " left out, eval_accuracy was recorded 0 times, a curve needs two"
    assert whys["torn"].startswith(" left out, cannot be read (ParserError")
    assert whys["empty"].startswith(" left out, cannot be read (TypeError")
    assert whys["whole"].endswith("again is the same method and seed")
    assert whys["nothing"] == " holds no run (no config.yaml)"


def test_partial_runs_on_request(tmp_path):
    rows = [{"step": 0, "eval_accuracy": 0.1}, {"step": 1, "eval_accuracy": 0.2, "timing_s/step": 1.0}]
    write_run(tmp_path / "r", steps=9, rows=rows)
    assert list(read_all(tmp_path, partial=True).curves[0].completions) == [0, 6]


def test_methods_go_by_any_key(tmp_path):
    write_run(tmp_path / "r")
    options = {"metric": "eval_accuracy"}
    assert read([tmp_path], by=["advantage", "steps"], **options).curves[0].method == "a/4"
    assert read([tmp_path], by=["advantage.eps"], **options).curves[0].method == "1.0"
    for key, message in (
        ("algorithm", "name= tells them apart"),
        ("batch", "batch.group_size, batch.prompts_per_step"),
    ):
        with pytest.raises(ConfigError, match=message):
            read([tmp_path], by=[key], **options)


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_on_real_runs(tmp_path, capsys):
    runs = tmp_path / "runs"
    for baseline in ("mean", "leave_one_out"):
        arguments = f"advantage.baseline={baseline}", "steps=2", "tracking.samples_every_steps=0"
        trainer.fit(tiny_config(runs / baseline, *arguments))
    capsys.readouterr()
    picture = tmp_path / "picture.png"
    main([str(runs), "--by", "advantage.baseline", "--baseline", "mean", "--json", "--plot", str(picture)])
    found = json.loads(capsys.readouterr().out)
    assert [(method["name"], method["seeds"]) for method in found["methods"]] == [
        ("leave_one_out", [0]),
        ("mean", [0]),
    ]
    assert found["completions"] == 2 * 4 * 4
    assert found["notes"] == ["the methods differ in advantage.baseline"]
    ends = [
        json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[-1])["eval_accuracy"]
        for name in ("mean", "leave_one_out")
    ]
    assert found["views"][0]["differences"][0]["pairs"] == [ends[1] - ends[0]]
    assert all("nothing is shown" in line for line in found["sentences"][:-1])
    assert picture.read_bytes().startswith(b"\x89PNG")

    main([str(runs), "--by", "advantage.baseline"])
    printed = capsys.readouterr().out
    assert "mean - leave_one_out" in printed and "nothing is shown" in printed
    assert (runs / "comparison.png").exists()


def test_what_cannot_be_compared_is_one_line(tmp_path):
    with pytest.raises(RunError, match="holds no run .*; no run is left to compare"):
        main([str(tmp_path)])
    write_run(tmp_path / "r")
    with pytest.raises(ConfigError, match="--baseline b: no such method; --by advantage gives a"):
        main([str(tmp_path), "--by", "advantage", "--baseline", "b"])


# --- sweeps ------------------------------------------------------------------------------------------------------


INTERPRETER = """#!/usr/bin/env bash
# Stands for the interpreter: writes down what is run, leaves what a cold start leaves, and fails on request.
echo "$*" >>"$CALLS"
echo "begins on ${CUDA_VISIBLE_DEVICES-all}" >>"$CALLS.devices"
trap 'echo "ends on ${CUDA_VISIBLE_DEVICES-all}" >>"$CALLS.devices"' EXIT
[ "${LASTS_S:-0}" = 0 ] || sleep "$LASTS_S"
run=$(sed 's/.*run_dir=\\([^ ]*\\).*/\\1/' <<<"$*")
case "$*" in
*rltrain.sft*) mkdir "$run/cold_start" && echo "of $run" >"$run/cold_start/model" ;;
*broken=1*) echo "error: told to fail" && exit 1 ;;
esac
"""


@pytest.fixture
def sweep(tmp_path):
    """Run the script on two methods and two seeds; returns its result and the commands it gave."""
    interpreter, calls, methods = tmp_path / "interpreter", tmp_path / "calls", tmp_path / "two.txt"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    methods.write_text(
        "# name  overrides\n\ngrpo  +experiment=x\ntree +experiment=x advantage=t data.steps=[1,2] # why\n"
    )
    variables = {"OUT": str(tmp_path / "out"), "PYTHON": str(interpreter), "CALLS": str(calls), "JOBS": "1"}

    def run(*overrides, **more):
        calls.write_text("")
        command = ["bash", str(ROOT / "scripts/sweep.sh"), str(methods), "2", *overrides]
        result = subprocess.run(command, env=os.environ | variables | more, capture_output=True, text=True, timeout=60)
        return result, calls.read_text().splitlines()

    return run


def test_a_sweep_runs_every_method_on_every_seed_and_compares(sweep, tmp_path):
    result, calls = sweep("steps=3")
    out = tmp_path / "out"
    assert result.returncode == 0, result.stderr
    grpo = "tracking.group=out steps=3 +experiment=x name=grpo"
    tree = "tracking.group=out steps=3 +experiment=x advantage=t data.steps=[1,2] name=tree"
    assert calls == [
        f"-m rltrain.sft {grpo} seed=0 run_dir={out}/grpo-seed0",
        f"-m rltrain.sft {grpo} seed=1 run_dir={out}/grpo-seed1",
        f"-m rltrain.train {grpo} seed=0 run_dir={out}/grpo-seed0",
        f"-m rltrain.train {tree} seed=0 run_dir={out}/tree-seed0",
        f"-m rltrain.train {grpo} seed=1 run_dir={out}/grpo-seed1",
        f"-m rltrain.train {tree} seed=1 run_dir={out}/tree-seed1",
        f"-m rltrain.compare {out} --baseline grpo",
    ]
    for seed in range(2):
        assert (out / f"tree-seed{seed}/cold_start/model").read_text() == f"of {out}/grpo-seed{seed}\n"


def test_a_sweep_goes_on_where_it_was(sweep, tmp_path):
    """What is finished is skipped; what failed, and what is asked for anew, runs; the others run all the same."""
    result, calls = sweep("broken=1")
    assert result.returncode == 1
    assert "sweep: tree, seed 1 stopped: error: told to fail" in result.stderr
    assert len([call for call in calls if "rltrain.train" in call]) == 4
    assert len([call for call in sweep()[1] if "rltrain.train" in call]) == 4
    (tmp_path / "out/tree-seed1/finished.txt").unlink()
    again = sweep()[1]
    assert [call.split("run_dir=")[-1] for call in again[:-1]] == [f"{tmp_path}/out/tree-seed1"]
    assert len(sweep("steps=9")[1]) == 4 + 1


@pytest.mark.parametrize("visible", ["3,5", None], ids=["CUDA_VISIBLE_DEVICES", "nvidia-smi"])
def test_runs_at_the_same_time_have_different_gpus(sweep, tmp_path, monkeypatch, visible):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    more = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    driver = tmp_path / "nvidia-smi"
    driver.write_text('#!/bin/sh\nfor gpu in 0 1; do echo "GPU $gpu: NVIDIA H200 (UUID: GPU-$gpu)"; done\n')
    driver.chmod(0o755)
    result, _ = sweep(JOBS="", LASTS_S="0.2", PATH=f"{tmp_path}:{os.environ['PATH']}", **more)
    assert result.returncode == 0, result.stderr
    busy, used = set(), set()
    for line in (tmp_path / "calls.devices").read_text().splitlines()[:-2]:  # the last two are of the comparison
        event, _, device = line.split()
        assert (device in busy) == (event == "ends")
        busy ^= {device}
        used.add(device)
    assert used == ({"3", "5"} if visible else {"0", "1"})


def test_a_method_without_a_name_is_refused(sweep, tmp_path):
    (tmp_path / "two.txt").write_text("advantage=t\n")
    result, calls = sweep()
    assert (result.returncode, calls) == (1, [])
    assert "sweep.sh: no name before advantage=t" in result.stderr
