"""A user's estimator that breaks its contract ends a run before the optimiser moves, with one line that says where."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import OVERRIDES, config, metrics

from rltrain import trainer
from rltrain.advantages.check import EstimatorError
from rltrain.errors import ConfigError
from rltrain.types import Need

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("function", "steps_done", "message"),
    [
        (
            "one_value_per_completion",
            0,
            r"group 0 \(problem \S+\): has a tensor of shape \(4,\), expected a list of 4 tensors, one per completion",
        ),
        (
            "not_finite_later",
            1,
            r"group 1 \(problem \S+\), completion 2: the value of token \d+ is nan, expected a finite number \(1 of ",
        ),
        (
            "in_place",
            0,
            r"group 0 \(problem \S+\): changed group.rewards_G in place from \[.*\] to \[-.*\]; work on group",
        ),
    ],
)
def test_a_broken_contract_ends_the_run_before_the_optimiser_moves(function, steps_done, message, tmp_path):
    path = f"user_estimators:{function}"
    overrides = ["advantage=custom", f"advantage.import_path={path}", "steps=3", "evaluation.every_steps=0"]
    with pytest.raises(EstimatorError) as caught:
        trainer.fit(config(tmp_path / "run", *overrides))
    assert re.match(rf"advantage\.import_path={path}: {message}", str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
    assert [line["step"] for line in metrics(tmp_path / "run")][-1] == steps_done


@pytest.mark.parametrize(
    ("function", "code", "line"),
    [
        ("in_place", 1, r"error: advantage\.import_path=user_estimators:in_place: group 0 .* in place from .*"),
        (
            "two_arguments",
            2,
            r"config error: .*advantage\.import_path=user_estimators:two_arguments: takes \(groups, context\); give.*",
        ),
    ],
)
def test_the_command_line_says_it_in_one_line(function, code, line, tmp_path):
    command = [sys.executable, "-m", "rltrain.train", *OVERRIDES, f"run_dir={tmp_path / 'run'}", "advantage=custom"]
    command += [f"advantage.import_path=user_estimators:{function}", "tracking.wandb=disabled"]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert re.fullmatch(line, done.stderr.strip().splitlines()[-1]), done.stderr


def test_a_function_declares_what_it_needs(tmp_path):
    """Its attribute gives it the scorer, without a file in the package."""
    overrides = ["advantage=custom", "advantage.import_path=user_estimators:at_high_entropy", "steps=2"]
    run_config = config(tmp_path / "run", *overrides)
    assert run_config.needs() == {Need.SCORER}
    trainer.fit(run_config)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1, 2]
    assert metrics(tmp_path / "run")[1]["grad_norm"] > 0


def test_needs_in_the_config_are_checked(tmp_path):
    custom = ["advantage=custom", "advantage.import_path=user_estimators:one_value_per_completion"]
    assert config(tmp_path, *custom, "advantage.needs=[probes,scorer]").needs() == {Need.PROBES, Need.SCORER}
    with pytest.raises(ConfigError, match="advantage.needs=continuation: unknown; set one of .*probes, scorer"):
        config(tmp_path, *custom, "advantage.needs=[continuation]")
