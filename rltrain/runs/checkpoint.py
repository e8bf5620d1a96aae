"""Exact save and load. A checkpoint is a folder that appears complete or not at all: it is written
under another name, checksummed, synced, then renamed.

run_dir/checkpoints/step_000050/
    manifest.json     step, config, ZeRO stage, ranks, checksum and size of every file
    optimizer/        fp32 weights and AdamW's moments, by parameter name, a file per rank (rltrain.engine.zero_shards)
    policy/           a plain transformers folder, or adapters
    parts.json        state_dict of stateful parts; a batch that was sampled ahead
    tensors.safetensors   their tensors, if they have any

Nothing is pickled, and nothing depends on the ZeRO stage or on the number of ranks. Several nodes need shared storage.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rltrain.config import CheckpointConfig, RunConfig
from rltrain.engine.deepspeed import Engine
from rltrain.engine.zero_shards import full_shape
from rltrain.errors import ConfigError, RunError
from rltrain.policy.load import Policy, save_policy
from rltrain.runs import run_folder
from rltrain.runtime import dist

log = logging.getLogger(__name__)

T = TypeVar("T")
Files = dict[str, dict[str, Any]]

FORMAT = 2
TENSORS = "tensors.safetensors"

# These and the number of ranks change the order of sums, so the result to rounding.
SHARDING_KEYS = ("deepspeed",)


class CheckpointError(RunError):
    """A checkpoint that cannot be written or read. The message names it and the remedy."""


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


def resume_point(run_dir: Path, config: RunConfig) -> Saved | None:
    """The checkpoint to go on from: intact, and made with this config."""
    if config.checkpoint.resume == "never" and list_checkpoints(run_dir):
        raise ConfigError(
            f"run_dir={run_dir}: holds a run; set another run_dir, or checkpoint.resume=auto to continue it"
        )
    saved = newest_intact(run_dir)
    if saved is None:
        check_same_folder(run_dir, config)
    else:
        check_same_config(saved, config)
    return saved


def check_same_folder(run_dir: Path, config: RunConfig) -> None:
    """Refuse a folder with the records of another config, where there is no checkpoint to go on from."""
    held = run_folder.config_of(run_dir)
    if held is None:
        return
    made_with = run_folder.with_new_keys(held, config)
    if changes := run_folder.changes(made_with, run_folder.resolved(config), ignored=_free_keys(config)):
        raise ConfigError(
            f"run_dir={run_dir}: holds a run of another config ({changes}); restore these keys, set another run_dir, "
            "or delete the folder"
        )


def _free_keys(config: RunConfig) -> list[str]:
    """Other schedules end at the last step, so every learning rate depends on the number of steps."""
    steps = ["steps"] if config.optimizer.schedule == "constant" else []
    return [*run_folder.FREE_KEYS, *steps, *SHARDING_KEYS]


def newest_intact(run_dir: Path) -> Saved | None:
    """The newest checkpoint whose files have the sizes and checksums of its manifest. Damaged ones are named in
    a warning.

    Rank 0 checks them for all ranks.
    """
    saved = _newest_intact(run_dir) if dist.is_main() else None
    return dist.gather_objects(saved, name="the newest intact checkpoint")[0]


def _newest_intact(run_dir: Path) -> Saved | None:
    for saved in reversed(list_checkpoints(run_dir)):
        damage = find_damage(saved)
        if damage is None:
            return saved
        log.warning("checkpoint %s is damaged (%s); trying the one before it", saved.path, damage)
    return None


def find_damage(saved: Saved) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = saved.manifest
        files, version = manifest["files"].items(), manifest.get("version")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json: {error!r}"
    if version != FORMAT:
        return f"manifest.json: version {version}, this code reads {FORMAT}"
    for name, entry in files:
        path = saved.path / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {entry['bytes']}"
        if _sha256(path) != entry["sha256"]:
            return f"{name} has another checksum"
    return None


def check_same_config(saved: Saved, config: RunConfig) -> None:
    """Refuse to resume a run under a config that computes something else. The error names the keys.

    Another ZeRO stage or number of ranks is accepted, with a warning that sums are then in another order. A key that is
    newer than the checkpoint counts as its default.
    """
    manifest, now = saved.manifest, run_folder.resolved(config)
    made_with = run_folder.with_new_keys(manifest["config"], config)
    if changes := run_folder.changes(made_with, now, ignored=_free_keys(config)):
        raise ConfigError(
            f"{saved.path}: made with another config ({changes}); restore these keys or set another run_dir"
        )
    before = {key: made_with[key] for key in SHARDING_KEYS} | {"ranks": manifest["world_size"]}
    after = {key: now[key] for key in SHARDING_KEYS} | {"ranks": dist.world_size()}
    if (moved := run_folder.changes(before, after, reasons=False)) and dist.is_main():
        log.warning("%s: resumed with another layout (%s); equal to rounding, not bit for bit", saved.path, moved)


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
    """Write a checkpoint. All ranks call this. On any failure the older ones stay as they were."""
    final = run_dir / "checkpoints" / f"step_{step:06d}"
    writing = final.with_name(f".writing_{final.name}")
    start = time.perf_counter()

    def make_room() -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        for left in final.parent.glob(".writing_*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        _check_space(final.parent, needed=_expected_bytes(engine, policy, tensors))
        writing.mkdir()

    def write_part() -> Files:
        written = [engine.save_state(writing / "optimizer")]
        if dist.is_main():
            written += _write_shared(writing, policy=policy, parts=parts, tensors=tensors)
        return {str(path.relative_to(writing)): _synced(path) for path in written}

    def finish(files: Files) -> None:
        manifest = {
            "version": FORMAT,
            "step": step,
            "world_size": dist.world_size(),
            "zero_stage": engine.zero_stage,
            "seconds": round(time.perf_counter() - start, 3),
            "config": config,
            "files": files,
        }
        _finish(writing, final, manifest)

    try:
        _together("checkpoint folder", lambda: make_room() if dist.is_main() else None)
        with engine.whole_weights():
            written = _together("every rank's part of the checkpoint", write_part)
        files = {name: entry for part in written for name, entry in part.items()}
        _together("checkpoint written", lambda: finish(files) if dist.is_main() else None)
    except CheckpointError as error:
        if dist.is_main():
            shutil.rmtree(writing, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint of step {step} was not written to {final.parent} ({error}); older checkpoints are intact: "
            "free space or mend the folder, then run the same command to resume"
        ) from error
    return Saved(path=final, step=step)


def _together(name: str, work: Callable[[], T]) -> list[T]:
    """Run ``work`` on every rank. Returns the results in rank order, or raises the same error on all ranks."""
    result: T | None = None
    failure = None
    try:
        result = work()
    except (OSError, SafetensorError, CheckpointError) as error:
        failure = f"{str(error).splitlines()[0]}"
    outcomes = dist.gather_objects((result, failure), name=name)
    failures = [f"rank {rank}: {message}" for rank, (_, message) in enumerate(outcomes) if message]
    if failures:
        raise CheckpointError(failures[0])
    return [value for value, _ in outcomes]  # type: ignore[misc]


def _expected_bytes(engine: Engine, policy: Policy, tensors: Mapping[str, Tensor]) -> int:
    """The size of a checkpoint: shards, exported weights, tensors of parts."""
    saved = [p for p in policy.model.parameters() if p.requires_grad or not hasattr(policy.model, "peft_config")]
    exported = sum(full_shape(p).numel() * p.element_size() for p in saved)
    return engine.state_bytes() + exported + sum(tensor.nbytes for tensor in tensors.values())


def _check_space(folder: Path, *, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{free / 2**30:.3f} GiB free, a checkpoint takes {needed / 2**30:.3f} GiB")


def _write_shared(
    writing: Path, *, policy: Policy, parts: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[Path]:
    """Write the exported policy and the state of the parts, on one rank for all."""
    save_policy(policy, writing / "policy")
    (writing / "parts.json").write_text(json.dumps(dict(parts)))
    written = [*(path for path in (writing / "policy").rglob("*") if path.is_file()), writing / "parts.json"]
    if tensors:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, writing / TENSORS)
        written.append(writing / TENSORS)
    return written


def _finish(writing: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest last, then rename: a folder without both is no checkpoint."""
    (writing / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in (writing / "manifest.json", writing / "optimizer", writing / "policy", writing):
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    writing.replace(final)
    _sync(final.parent)


def _synced(path: Path) -> dict[str, Any]:
    """Size and checksum of a file that is now on disk."""
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(saved: Saved, *, engine: Engine) -> dict[str, Any]:
    """Restore weights and optimiser, under any ZeRO stage and number of ranks. Returns the state of the parts."""
    engine.load_state(saved.path / "optimizer")
    return json.loads((saved.path / "parts.json").read_text())


def load_tensors(saved: Saved) -> dict[str, Tensor]:
    """The tensors of the stateful parts, on the CPU; an empty dict if the run had none."""
    path = saved.path / TENSORS
    return load_file(path) if path.exists() else {}


def prune(run_dir: Path, config: CheckpointConfig, *, step: int, best_step: int | None) -> None:
    """Delete all checkpoints but the last n up to ``step`` and the best. Later ones were skipped as damaged."""
    saved = list_checkpoints(run_dir)
    past = [checkpoint.step for checkpoint in saved if checkpoint.step <= step]
    kept = {*past[-config.keep_last :]} | ({best_step} if config.keep_best else set())
    for checkpoint in saved:
        if checkpoint.step not in kept:
            shutil.rmtree(checkpoint.path)
