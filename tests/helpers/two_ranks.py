"""A whole run on two ranks, and what must equal the run of one."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import OVERRIDES, metrics

from rltrain.runs import checkpoint

PERSISTENCE = ("stage3_param_persistence_threshold", "stage3_model_persistence_threshold")


ROOT = Path(__file__).parents[2]


def train(run_dir, ranks: int, *overrides: str) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    chosen = {override.partition("=")[0] for override in overrides}
    defaults = [override for override in OVERRIDES if override.partition("=")[0] not in chosen]
    command = [sys.executable, *launcher, "-m", "rltrain.train", *defaults, f"run_dir={run_dir}", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


def train_all(folder: Path, runs: Mapping[str, Sequence[str]]) -> None:
    """Runs of two ranks one after another, in processes that start once; the folder of each has its name."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    listed = json.dumps([[*OVERRIDES, *overrides, f"run_dir={folder / name}"] for name, overrides in runs.items()])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(ROOT / "tests/helpers/fit_all.py"), listed]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr


def assert_same_run(left: Path, right: Path):
    for line, expected in zip(metrics(left), metrics(right), strict=True):
        assert line == pytest.approx(expected, rel=2e-4, abs=2e-6), line["step"]
    one, two = (_weights(d) for d in (left, right))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=5e-5)


def _weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint: all, or those of its adapters."""
    (file,) = checkpoint.list_checkpoints(run_dir)[-1].policy.glob("*model.safetensors")
    return load_file(file)
