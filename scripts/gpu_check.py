"""Does rltrain work on this machine, and how fast: a line a check, and a JSON file to send in an issue.

    python scripts/gpu_check.py [--json FILE] [--only WORD …]     about ten minutes on a GPU
    python scripts/gpu_check.py --cpu                             the same checks small; skips by name what needs a GPU

The verdict of a check is ok, FAILED (what was expected stands beside it), or skipped with the reason. Times are
figures, not verdicts. Exit code 1 if a check failed. docs/gpu.md says what to do about each.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_checks import head, models, runs  # noqa: F401 - each registers its checks
from gpu_checks.machine import CHECKS, Finding, Machine, Skipped

from rltrain.errors import ConfigError
from rltrain.runtime import dist

PACKAGES = ("rltrain", "torch", "triton", "transformers", "deepspeed", "vllm", "liger-kernel", "cut-cross-entropy")


def versions() -> dict[str, str]:
    """Of what matters, as installed here."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available():
        found |= {
            "cuda": str(torch.version.cuda),
            "gpu": torch.cuda.get_device_name(),
            "gpus": str(torch.cuda.device_count()),
        }
    return found


def _require_gpu() -> None:
    """Exit in one line where torch has no GPU."""
    try:
        dist.refuse_unused_gpu()
    except ConfigError as error:
        sys.exit(f"gpu_check: {error}")
    if not torch.cuda.is_available():
        sys.exit("gpu_check: torch sees no GPU here; --cpu runs the same checks small")


def run_check(machine: Machine, name: str, function: Callable[[Machine], Finding]) -> dict[str, Any]:
    """The record of a check; an error in it is a failure with its message."""
    start = time.perf_counter()
    try:
        finding = function(machine)
        verdict = "ok" if finding.ok else "FAILED"
    except Skipped as reason:
        finding, verdict = Finding(expected="", found=str(reason), ok=True), "skipped"
    except Exception as error:  # a check must not keep the others from running
        finding, verdict = (
            Finding(expected="no error", found=f"{type(error).__name__}: {error}"[:400], ok=False),
            "FAILED",
        )
    record = {"name": name, "verdict": verdict, "expected": finding.expected, "found": finding.found}
    return record | {"seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    """All checks, in an order in which later ones may use what earlier ones left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="check the CPU, also beside a GPU")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--only", nargs="*", default=[], help="words of the names of checks")
    arguments = parser.parse_args()
    if not arguments.cpu:
        _require_gpu()
    chosen = {name: f for name, f in CHECKS.items() if not arguments.only or any(w in name for w in arguments.only)}
    print(", ".join(f"{name} {version}" for name, version in versions().items()), flush=True)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(device=torch.device("cpu") if arguments.cpu else torch.device("cuda", 0), folder=Path(folder))
        for name, function in chosen.items():
            records.append(run_check(machine, name, function))
            made = records[-1]
            print(f"{made['verdict']:8s}{name}: expected {made['expected'] or '-'}; found {made['found']}", flush=True)
    arguments.json.write_text(json.dumps({"versions": versions(), "checks": records}, indent=1))
    counts = {verdict: sum(one["verdict"] == verdict for one in records) for verdict in ("ok", "FAILED", "skipped")}
    print(f"{counts['ok']} ok, {counts['FAILED']} failed, {counts['skipped']} skipped; {arguments.json}")
    sys.exit(1 if counts["FAILED"] else 0)


if __name__ == "__main__":
    main()
