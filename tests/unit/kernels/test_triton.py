"""Triton without a GPU: the interpreter needs a process of its own, with its variable set before the import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    cases = [str(ROOT / "tests" / "helpers" / "triton_interpreted.py"), "-q", "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *cases], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
