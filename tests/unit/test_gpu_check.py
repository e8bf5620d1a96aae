"""scripts/gpu_check.py --cpu: its quick checks pass, a wrong result fails, and an error is a failure with its words."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import gpu_check
from gpu_checks import head
from gpu_checks.machine import CHECKS, Finding, Machine

RUNS = "the device", "quickstart", "stop and resume", "ZeRO"  # of processes: minutes, and other tests have them
QUICK = [name for name in CHECKS if not name.startswith(RUNS)]
NEED_A_GPU = {"kernels of attention", "decode by vLLM"}


@pytest.fixture
def machine(tmp_path):
    return Machine(device=torch.device("cpu"), folder=tmp_path)


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_check_passes_on_a_cpu_or_names_what_it_needs(machine, name):
    record = gpu_check.run_check(machine, name, CHECKS[name])
    assert record["verdict"] == ("skipped" if name in NEED_A_GPU else "ok"), record
    assert record["found"]


def test_the_heads_gradients_are_compared_in_all_rows(machine):
    """A backend that is wrong in the last row's gradient alone, or in that of W, is apart from the reference."""
    case = head.head(machine, 130, 50, 8, torch.float32)
    expected = head.reference_results(case, piece_rows=64)
    whole = head.head_results(case, "reference")
    assert head.apart(expected, whole) < 1e-6
    for result in (2, 3):
        wrong = [tensor.clone() for tensor in whole]
        wrong[result][-1] += 0.1 * wrong[result].abs().max()
        assert head.apart(wrong, expected) == pytest.approx(0.1, rel=1e-3)


def test_a_check_that_ends_in_an_error_or_finds_another_value_has_failed(machine):
    def broken(_):
        raise ValueError("no such kernel")

    assert gpu_check.run_check(machine, "x", broken)["found"] == "ValueError: no such kernel"
    found = Finding(expected="1", found="2", ok=False)
    verdicts = [gpu_check.run_check(machine, "x", check)["verdict"] for check in (broken, lambda _: found)]
    assert verdicts == ["FAILED", "FAILED"]
