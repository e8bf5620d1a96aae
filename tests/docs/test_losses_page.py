"""The page on losses: the example of a user's loss trains, and its gradient is the one the text says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_batches import batch
from tiny_run import OVERRIDES, metrics

from rltrain import cli
from rltrain.errors import RunError
from rltrain.loss import policy_loss
from rltrain.registry import discover, parts

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/algorithms/losses.md").read_text(encoding="utf-8")
CODE, COMMAND = (re.search(rf"```{language}\n(.*?)```", PAGE, re.S)[1] for language in ("python", "bash"))


@pytest.fixture
def my_losses(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(CODE + "\n\ndef bare(logprobs_N, batch, options):\n    return logprobs_N\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_losses", None)
    return tmp_path


def test_every_loss_has_a_row():
    discover()
    table = PAGE.split("## At ratio 1")[0]
    assert {part.name for part in parts("loss")} == set(re.findall(r"^\| `(\w+)` \|", table, re.M))


def test_the_example_by_hand(my_losses):
    """rho = 1.2, width 0.2: 1 + 0.2·tanh(1) = 1.1523; its slope by log rho is (1 - tanh²(1))·1.2 = 0.5040."""
    config = cli.compose(["loss=custom", "loss.import_path=my_losses:smooth"]).loss
    logprobs = torch.tensor([1.2], dtype=torch.float64).log().requires_grad_()
    output = policy_loss(logprobs, batch([2.0]), config)
    output.loss.backward()
    assert float(output.loss.detach()) == pytest.approx(-2 * 1.1523188311911528)
    assert float(logprobs.grad) == pytest.approx(-2 * 0.5039692)
    assert output.metrics["loss/saturated"].total == 0.0  # ln 1.2 = 0.18


def test_a_loss_that_returns_something_else_is_told(my_losses):
    config = cli.compose(["loss=custom", "loss.import_path=my_losses:bare"]).loss
    with pytest.raises(RunError, match="loss.import_path=my_losses:bare: returned Tensor; return LossTerms"):
        policy_loss(torch.zeros(1), batch([1.0]), config)


def test_the_example_trains(my_losses):
    program, *arguments = shlex.split(COMMAND.replace("\\\n", " "))
    assert program == "python"
    small = [one for one in OVERRIDES if not one.startswith(("data=", "reward@", "steps="))]
    reward = ["reward@rewards.answer=random", "cold_start.steps=0", "steps=2", f"run_dir={my_losses / 'run'}"]
    result = subprocess.run(
        [sys.executable, *arguments, *small, *reward], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": f"{my_losses}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert all("loss/saturated" in line and line["grad_norm"] > 0 for line in metrics(my_losses / "run")[-2:])
