"""Exact save and load. A checkpoint is a folder that appears whole: written aside, checksummed, synced, renamed.

run_dir/checkpoints/step_000050/
    manifest.json     step, config, checksum and size of every file
    engine/           DeepSpeed's state: weights, optimiser, one file per rank where sharded
    policy/           a plain transformers folder
    parts.json        state_dict of stateful parts
    tensors.safetensors   their tensors, if they have any
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rltrain import dist, runs
from rltrain.config import CheckpointConfig, ConfigError, RunError
from rltrain.engine import Engine
from rltrain.model import Policy

log = logging.getLogger(__name__)

TENSORS = "tensors.safetensors"

# Keys that may differ between a checkpoint and the run that resumes it: they do not change what is computed.
FREE_KEYS = ("run_dir", "name", "steps", "tracking", "checkpoint", "deadline_s")


class CheckpointError(RunError):
    """A checkpoint that cannot be written or read; says which and what to do."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A complete checkpoint on disk."""

    path: Path
    step: int

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.path / "manifest.json").read_text())

    @property
    def policy(self) -> Path:
        return self.path / "policy"


def list_checkpoints(run_dir: Path) -> list[Saved]:
    """Complete checkpoints, oldest first. Folders without a manifest were never finished."""
    folders = sorted((run_dir / "checkpoints").glob("step_*"))
    return [Saved(path=folder, step=int(folder.name[5:])) for folder in folders if (folder / "manifest.json").exists()]


def newest_intact(run_dir: Path) -> Saved | None:
    """The newest checkpoint whose files have the sizes and checksums of its manifest; damaged ones are named."""
    for saved in reversed(list_checkpoints(run_dir)):
        damage = find_damage(saved)
        if damage is None:
            return saved
        log.warning("checkpoint %s is damaged (%s); trying the one before it", saved.path, damage)
    return None


def find_damage(saved: Saved) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        files = saved.manifest["files"]
    except (json.JSONDecodeError, KeyError) as error:
        return f"manifest.json: {error}"
    for name, entry in files.items():
        path = saved.path / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {entry['bytes']}"
        if _sha256(path) != entry["sha256"]:
            return f"{name} has another checksum"
    return None


def check_same_config(saved: Saved, config: Mapping[str, Any]) -> None:
    """Refuse to resume a run under a config that computes something else; the error names the keys."""
    # A schedule that ends at the last step makes every rate depend on how many steps there are.
    free = [key for key in FREE_KEYS if key != "steps" or config["optimizer"]["schedule"] == "constant"]
    if changes := runs.changes(saved.manifest["config"], config, ignored=free):
        raise ConfigError(
            f"{saved.path}: made with another config ({changes}); restore these keys or set another run_dir"
        )


def save(
    run_dir: Path,
    step: int,
    *,
    engine: Engine,
    policy: Policy,
    parts: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> Saved:
    """Write a checkpoint; all ranks call this. On any failure the older ones stay as they were."""
    final = run_dir / "checkpoints" / f"step_{step:06d}"
    writing = final.with_name(f".writing_{final.name}")
    if dist.is_main():
        shutil.rmtree(writing, ignore_errors=True)
        _check_space(final.parent)
        writing.mkdir(parents=True)
    dist.barrier("checkpoint folder")
    try:
        engine.save_state(writing / "engine")
        with engine.whole_weights():
            if dist.is_main():
                export(policy, writing / "policy")
        dist.barrier("every rank's part of the checkpoint")
        if dist.is_main():
            (writing / "parts.json").write_text(json.dumps(dict(parts)))
            if tensors:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, writing / TENSORS)
            _finish(writing, final, step=step, config=config)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint of step {step} was not written to {final.parent} ({str(error).splitlines()[0]}); older "
            "checkpoints are intact: free space or mend the folder, then run the same command to resume"
        ) from error
    dist.barrier("checkpoint written")
    return Saved(path=final, step=step)


def _check_space(folder: Path) -> None:
    """Fail early when less is free than the newest checkpoint took."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = list_checkpoints(folder.parent)
    needed = sum(entry["bytes"] for entry in saved[-1].manifest["files"].values()) if saved else 0
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: {free / 2**30:.2f} GiB free, a checkpoint takes {needed / 2**30:.2f} GiB; older checkpoints "
            "are intact: free space, then run the same command to resume"
        )


def _finish(writing: Path, final: Path, *, step: int, config: Mapping[str, Any]) -> None:
    files = {}
    for path in sorted(p for p in writing.rglob("*") if p.is_file()):
        _sync(path)
        files[str(path.relative_to(writing))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {"step": step, "world_size": dist.world_size(), "config": config, "files": files}
    (writing / "manifest.json").write_text(json.dumps(manifest, indent=1))
    _sync(writing / "manifest.json")
    _sync(writing)
    shutil.rmtree(final, ignore_errors=True)
    writing.replace(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def export(policy: Policy, folder: Path) -> None:
    """A plain transformers folder; LoRA adapters are saved as adapters."""
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def load(saved: Saved, *, engine: Engine) -> dict[str, Any]:
    """Restore weights, optimiser and schedule; returns the state of the stateful parts."""
    world_size = saved.manifest["world_size"]
    if world_size != dist.world_size() and engine.zero_stage > 0:
        raise ConfigError(
            f"{saved.path}: saved by {world_size} ranks at ZeRO stage {engine.zero_stage}, resumed by "
            f"{dist.world_size()}; start it with {world_size} ranks"
        )
    engine.load_state(saved.path / "engine")
    return json.loads((saved.path / "parts.json").read_text())


def load_tensors(saved: Saved) -> dict[str, Tensor]:
    """The tensors of the stateful parts, on the CPU; none if the run had none."""
    path = saved.path / TENSORS
    return load_file(path) if path.exists() else {}


def prune(run_dir: Path, config: CheckpointConfig, *, step: int, best_step: int | None) -> None:
    """Keep the last n up to ``step`` and the best; runs on rank 0. Later ones were passed over as damaged."""
    saved = list_checkpoints(run_dir)
    past = [one.step for one in saved if one.step <= step]
    kept = {*past[-config.keep_last :]} | ({best_step} if config.keep_best else set())
    for one in saved:
        if one.step not in kept:
            shutil.rmtree(one.path)
