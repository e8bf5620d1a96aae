"""The policy of a checkpoint with the weights of the optimiser: of any ZeRO stage, number of ranks and precision."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from rltrain.engine.zero_shards import Archive
from rltrain.errors import ConfigError
from rltrain.policy.load import Policy, config_of, load_policy
from rltrain.runs import checkpoint
from rltrain.runs.checkpoint import Saved


def find(path: Path) -> Saved:
    """The checkpoint at ``path``, or the newest intact one of the run there."""
    if (path / "manifest.json").exists():
        saved = Saved(path=path, step=int(path.name.removeprefix("step_")))
        if damage := checkpoint.find_damage(saved):
            raise ConfigError(f"{path}: damaged ({damage}); export another checkpoint")
        return saved
    saved = checkpoint.newest_intact(path)
    if saved is None:
        raise ConfigError(f"{path}: holds no intact checkpoint; give a folder step_… or the run_dir around it")
    return saved


def load(saved: Saved, *, dtype: str | None, merge_lora: bool = False) -> Policy:
    """The policy of a checkpoint, with the weights of the optimiser. ``dtype=None`` is that of the run."""
    config = config_of(saved.manifest["config"]["model"])
    policy = load_policy(dataclasses.replace(config, dtype=dtype or config.dtype), path=str(saved.policy))
    archive = Archive(saved.path / "optimizer")
    parameters = dict(policy.model.named_parameters())
    with torch.no_grad():
        for name in archive.names():
            parameter = parameters[name.removeprefix("model.")]  # the engine trains a module around the policy
            parameter.copy_(archive.weight(name).view_as(parameter))
    if merge_lora and policy.base is not None:
        return dataclasses.replace(policy, model=policy.model.merge_and_unload(), base=None)
    return policy
