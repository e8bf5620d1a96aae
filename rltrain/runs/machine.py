"""The machine that a run computes on, as far as it changes the last bits of a sum."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """Host, its kind, processor, vector instructions, threads, accelerator."""
    import torch

    return {
        "host": os.uname().nodename,
        "kind": f"{platform.system()} {platform.machine()}, {_surroundings()}",
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def in_words() -> str:
    """The same in a line."""
    known = describe()
    kind = known["accelerator"] or f"{known['cpu']} ({known['cpu_capability']})"
    return f"{known['host']}, {kind}, {known['threads']} of {known['cores']} threads"


def _cpu() -> str:
    """The processor's model."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model", "CPU part"))]
    return named[0] if named else platform.processor() or platform.machine()


def _surroundings() -> str:
    """What the operating system runs in."""
    if "SLURM_JOB_ID" in os.environ:
        return "Slurm job"
    in_container = Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()
    return "container" if in_container or "KUBERNETES_SERVICE_HOST" in os.environ else "host"
