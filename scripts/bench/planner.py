"""The planner's peaks and times against measured ones of real runs, each in a process of its own.

python scripts/bench/planner.py [--time] [--smollm2 FOLDER] [--only NAME …]

CPU, fp32, one rank. The baseline is taken after a run of a very small model, so that libraries and caches are loaded,
and the kernel's record of the peak is reset there (/proc/self/clear_refs; Linux). Micro-batches are full, and
completions never end early. Saving is left out: it happens in the host's memory, which a plan for GPUs is not about.

With --time: seconds of a step and of its decoding on one thread, estimated from this machine's calibration and measured
over three steps, both as CPU time of the process, so that a neighbour on the machine changes them little.
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
import time
from pathlib import Path
from typing import Any

MIB = 2**20
TIMED_STEPS = 3
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


def measure_time(overrides: list[str]) -> dict[str, float]:
    """In this process: CPU seconds of a step and of its decoding, estimated and measured."""
    from rltrain import cli
    from rltrain.plan import memory
    from rltrain.plan.calibration import this_cpu
    from rltrain.plan.model_shape import architecture
    from rltrain.plan.time import estimate, work_of
    from rltrain.rollout.local import LocalRollout

    spent = {"decode": 0.0}
    generate = LocalRollout.generate

    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.process_time()
        groups = generate(*arguments, **options)
        spent["decode"] += time.process_time() - start
        return groups

    LocalRollout.generate = timed
    config = cli.compose([*COMMON, *overrides])
    cluster = memory.Cluster(device="cpu")
    made = memory.plan(config, cluster, on_gpu=False)
    sizes = {"rows": made.load.rows, "tokens": made.load.tokens}
    device = this_cpu(config.model, architecture(config.model), made.shape, work_of(config, cluster), **sizes)
    with tempfile.TemporaryDirectory() as folder:
        run(SMALL, f"{folder}/small")
        totals, decodes = [], []
        for steps in (1, 1 + TIMED_STEPS):
            spent["decode"], start = 0.0, time.process_time()
            run([*overrides, f"steps={steps}"], f"{folder}/{steps}")
            totals.append(time.process_time() - start)
            decodes.append(spent["decode"])
    prompts = [len(ids) for ids in prompt_ids(config)]
    cluster = memory.Cluster(device="cpu", prompt_tokens=max(1, round(sum(prompts) / len(prompts))))
    times = estimate(config, made.shape, device, cluster)
    return {
        "predicted": times.total,
        "measured": (totals[1] - totals[0]) / TIMED_STEPS,
        "predicted decode": times.seconds["decode"],
        "measured decode": (decodes[1] - decodes[0]) / TIMED_STEPS,
        "GFLOP/s": device.fp32_flops / 1e9,
        "decode GFLOP/s": (device.decode_flops or 0.0) / 1e9,
        "GB/s": device.bandwidth / 1e9,
        "call us": device.call_s * 1e6,
    }


def prompt_ids(config: Any) -> list[tuple[int, ...]]:
    """The prompts of the first step."""
    from rltrain.data.prompts import PromptSource
    from rltrain.policy.load import load_policy

    prompts, _ = PromptSource(config, load_policy(config.model)).next(0)
    return [prompt.token_ids for prompt in prompts]


def main() -> None:
    """Each case in a child, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", help="a folder with SmolLM2-135M")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measured = measure_time if arguments.time else measure
        print("\n" + json.dumps(measured(json.loads(arguments.child))))
        return
    cases = CASES | ({"SmolLM2-135M": [*SMOLLM2, f"model.path={arguments.smollm2}"]} if arguments.smollm2 else {})
    # A freed block goes back to the system, so that what is resident is what is held.
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    unit = "s" if arguments.time else "MiB"
    print(f"{'run':28s}{f'predicted {unit}':>16s}{f'measured {unit}':>16s}{'ratio':>8s}")
    for name, overrides in cases.items():
        if arguments.only and name not in arguments.only:
            continue
        command = [sys.executable, __file__, "--child", json.dumps(overrides), *(["--time"] * arguments.time)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(f"{name}: {result.stderr}")
        found = json.loads(result.stdout.splitlines()[-1])
        scale, digits = (1.0, 3) if arguments.time else (MIB, 0)
        predicted, measured = found["predicted"] / scale, found["measured"] / scale
        print(f"{name:28s}{predicted:16.{digits}f}{measured:16.{digits}f}{predicted / measured:8.2f}", flush=True)
        parts = {key: round(value / scale, 3 if arguments.time else 1) for key, value in found.items()}
        print(f"  {parts}", file=sys.stderr)


if __name__ == "__main__":
    main()
