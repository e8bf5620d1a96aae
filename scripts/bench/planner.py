"""The planner's peaks against measured ones: growth of the resident memory of real runs, each in a process of its own.

python scripts/bench/planner.py [--smollm2 FOLDER] [--only NAME …]

CPU, fp32, one rank. The baseline is taken after a run of a very small model, so that libraries and caches are loaded,
and the kernel's record of the peak is reset there (/proc/self/clear_refs; Linux). Micro-batches are full, and
completions never end early. Saving is left out: it happens in the host's memory, which a plan for GPUs is not about.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MIB = 2**20
COMMON = [
    "data=small_integers",
    "reward@rewards.answer=random",
    "evaluation.every_steps=0",
    "checkpoint.every_steps=0",
    "tracking.wandb=disabled",
    "tracking.samples_every_steps=0",
    "steps=2",
]
SMALL = ["model.hidden_size=16", "model.heads=2", "model.layers=2", "batch.prompts_per_step=2", "batch.group_size=4"]
TINY = ["sampling.max_prompt_tokens=16", "sampling.max_new_tokens=48", "batch.token_budget=4096"]
# Groups stay whole in a micro-batch: small ones fill it.
TINY += ["batch.prompts_per_step=32", "batch.group_size=4"]
MEDIUM = ["model.hidden_size=512", "model.heads=8", "model.layers=9", "model.intermediate_size=1536"]
MEDIUM += ["sampling.max_prompt_tokens=16", "sampling.max_new_tokens=24", "batch.token_budget=480"]
MEDIUM += ["batch.prompts_per_step=4"]
SMOLLM2 = ["model=pretrained", "sampling.max_prompt_tokens=16", "sampling.max_new_tokens=16", "batch.token_budget=192"]
SMOLLM2 += ["batch.prompts_per_step=2", "batch.group_size=6", "optimizer.learning_rate=1e-6"]
CASES = {
    "30M": MEDIUM,
    "tiny 0.9M": TINY,
    "tiny 0.9M, checkpointing": [*TINY, "model.gradient_checkpointing=true"],
    "30M, ZeRO 2": [*MEDIUM, "deepspeed.zero_stage=2"],
}


def resident_bytes(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def run(overrides: list[str], folder: str) -> None:
    """Two steps without saving, of completions that never end early, since a plan is for the longest."""
    from rltrain import build, cli, trainer
    from rltrain.policy import load

    def load_policy(*arguments: Any, **options: Any) -> load.Policy:
        return dataclasses.replace(load.load_policy(*arguments, **options), stop_token_ids=())

    build.Run.maybe_save = lambda *_, **__: 0.0
    build.load_policy = load_policy
    trainer.fit(cli.compose([*COMMON, *overrides, f"run_dir={folder}"]))


def measure(overrides: list[str]) -> dict[str, float]:
    """In this process: predicted and measured peak."""
    from rltrain import cli
    from rltrain.plan import memory

    config = cli.compose([*COMMON, *overrides])
    made = memory.plan(config, memory.Cluster(), on_gpu=False)
    with tempfile.TemporaryDirectory() as folder:
        run(SMALL, f"{folder}/small")
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_bytes("VmRSS")
        run(overrides, f"{folder}/run")
    found = made.footprints[made.chosen]
    return {"measured": resident_bytes("VmHWM") - before, "predicted": found.peak, **vars(found)}


def main() -> None:
    """Each case in a child, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", help="a folder with SmolLM2-135M")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print("\n" + json.dumps(measure(json.loads(arguments.child))))
        return
    cases = CASES | ({"SmolLM2-135M": [*SMOLLM2, f"model.path={arguments.smollm2}"]} if arguments.smollm2 else {})
    # A freed block goes back to the system, so that what is resident is what is held.
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    print(f"{'run':28s}{'predicted MiB':>16s}{'measured MiB':>16s}{'ratio':>8s}")
    for name, overrides in cases.items():
        if arguments.only and name not in arguments.only:
            continue
        command = [sys.executable, __file__, "--child", json.dumps(overrides)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(f"{name}: {result.stderr}")
        found = json.loads(result.stdout.splitlines()[-1])
        predicted, measured = found["predicted"] / MIB, found["measured"] / MIB
        print(f"{name:28s}{predicted:16.0f}{measured:16.0f}{predicted / measured:8.2f}", flush=True)
        parts = {key: round(value / MIB, 1) for key, value in found.items()}
        print(f"  {parts}", file=sys.stderr)


if __name__ == "__main__":
    main()
