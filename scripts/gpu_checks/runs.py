"""Whole runs in processes of their own: devices, the quickstart, stop and resume, ZeRO, and a refusal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from gpu_checks.machine import Finding, Machine, Skipped, check, environment
from rltrain.errors import ConfigError
from rltrain.rollout.vllm_colocated import memory_arguments

RUN = ("+experiment=quickstart", "steps=2", "cold_start.steps=0", "evaluation.every_steps=0", "tracking.wandb=disabled")
RUN += ("batch.prompts_per_step=4", "batch.group_size=4", "checkpoint.every_steps=1", "reward@rewards.answer=random")
RUN_S = 900.0  # of a run; a busy CPU takes minutes for one


@check("the device that a command takes")
def device_of_a_command(machine: Machine) -> Finding:
    """Two processes at once join a group of their own, on one device, without a port."""
    code = (
        "from rltrain.runtime import dist; dist.setup(deadline_s=60.0); print(dist.device_in_words()); dist.teardown()"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment(machine))
        for _ in range(2)
    ]
    said = [run.communicate(timeout=RUN_S)[0].strip().splitlines()[-1:] for run in runs]
    ok = all(run.returncode == 0 for run in runs) and all(
        words and words[0].startswith(machine.device.type) for words in said
    )
    return Finding(expected=f"two processes at once on {machine.device.type}", found=f"{said}", ok=ok)


def train(machine: Machine, name: str, *overrides: str) -> tuple[int, list[dict[str, float]]]:
    """A short run in a process of its own: exit code, and the metrics of its steps."""
    command = [sys.executable, "-m", "rltrain.train", *RUN, *overrides, f"run_dir={machine.folder / name}"]
    done = subprocess.run(command, env=environment(machine), capture_output=True, text=True, timeout=RUN_S)
    if done.returncode:
        (machine.folder / f"{name}.err").write_text(done.stderr)
        print(done.stderr[-2000:], file=sys.stderr)
    return done.returncode, steps_of(machine.folder / name)


def steps_of(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl from step 1 on."""
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["step"] >= 1]


@check("quickstart, two steps in fp32 and bf16")
def quickstart(machine: Machine) -> Finding:
    """Ends well, and every step moves the weights; in bf16 after a cold start."""
    found, ok = [], True
    for name, overrides in {"fp32": (), "bf16": ("deepspeed=one_gpu", "cold_start.steps=2")}.items():
        code, steps = train(machine, f"quickstart_{name}", *overrides)
        norms = [step["grad_norm"] for step in steps]
        ok &= code == 0 and len(norms) == 2 and all(norm > 0 for norm in norms)
        found.append(f"{name} exit code {code}, gradient norms {[round(norm, 4) for norm in norms]}")
    return Finding(expected="exit code 0, two gradient norms above 0", found="; ".join(found), ok=ok)


@check("stop and resume")
def stop_and_resume(machine: Machine) -> Finding:
    """SIGTERM after the first step, and the same command: the second step is that of the unbroken run."""
    unbroken = steps_of(machine.folder / "quickstart_fp32")
    if len(unbroken) < 2:
        raise Skipped("needs the check 'quickstart, two steps in fp32 and bf16' before it")
    folder = machine.folder / "resumed"
    command = [sys.executable, "-m", "rltrain.train", *RUN, f"run_dir={folder}"]
    with subprocess.Popen(
        command, env=environment(machine), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as run:
        end = time.monotonic() + RUN_S
        while not steps_of(folder) and run.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        stopped = run.wait(RUN_S)
    code, steps = train(machine, "resumed")
    if len(steps) < 2:
        return Finding(
            expected="two steps", found=f"stopped with {stopped}, resumed with {code}, {len(steps)} steps", ok=False
        )
    difference = abs(steps[-1]["grad_norm"] / unbroken[-1]["grad_norm"] - 1)
    limit = 0.0 if machine.small else 1e-3
    found = f"stopped with {stopped}, resumed with {code}, gradient norm of step 2 apart by {difference:.1e}"
    ok = stopped in (0, 75) and code == 0 and difference <= limit
    return Finding(expected=f"75, 0, at most {limit:.0e}", found=found, ok=ok)


@check("ZeRO 2 and 3 on one rank")
def zero(machine: Machine) -> Finding:
    """The steps of an unsharded run, to rounding."""
    unbroken = steps_of(machine.folder / "quickstart_fp32")
    if len(unbroken) < 2:
        raise Skipped("needs the check 'quickstart, two steps in fp32 and bf16' before it")
    apart_by = {}
    for stage in (2, 3):
        code, steps = train(machine, f"zero{stage}", f"deepspeed.zero_stage={stage}")
        pairs = zip(steps, unbroken, strict=False)
        differences = [abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in pairs]
        apart_by[stage] = max(differences) if code == 0 and len(differences) == 2 else float("inf")
    found = ", ".join(f"ZeRO {stage} apart by {value:.1e}" for stage, value in apart_by.items())
    return Finding(expected="gradient norms within 1e-02", found=found, ok=max(apart_by.values()) <= 1e-2)


@check("a cache that cannot fit")
def cache_that_cannot_fit(machine: Machine) -> Finding:
    """A colocated engine on a card that the trainer fills is refused before it starts, in one line."""
    total = 80 * 2**30 if machine.small else torch.cuda.mem_get_info()[1]
    try:
        memory_arguments(total // 2, total, trained=total // 16, cache_gib=0.0, sleeps=True)
    except ConfigError as error:
        return Finding(expected="refused in one line", found=str(error)[:100], ok="\n" not in str(error))
    return Finding(expected="refused in one line", found="accepted", ok=False)
