"""A plain transformers folder from a checkpoint, offline: of any ZeRO stage and number of ranks, in any precision.

The weights are the fp32 ones that the optimiser holds, so ``--dtype float32`` of a bf16 run loses nothing.

    python scripts/export_hf.py runs/quickstart/checkpoints/step_000140 exported
    python scripts/export_hf.py runs/quickstart exported --dtype bfloat16     # the newest intact checkpoint of the run
    python scripts/export_hf.py runs/lora exported --merge-lora               # a whole model instead of adapters
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from rltrain import cli
from rltrain.engine.zero_shards import Archive
from rltrain.errors import ConfigError
from rltrain.policy.load import Policy, config_of, load_policy, save_policy
from rltrain.registry import discover
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


def load(saved: Saved, *, dtype: str | None) -> Policy:
    """The policy of a checkpoint, with the weights of the optimiser."""
    config = config_of(saved.manifest["config"]["model"])
    policy = load_policy(dataclasses.replace(config, dtype=dtype or config.dtype), path=str(saved.policy))
    archive = Archive(saved.path / "optimizer")
    parameters = dict(policy.model.named_parameters())
    with torch.no_grad():
        for name in archive.names():
            parameter = parameters[name.removeprefix("model.")]  # the engine trains a module around the policy
            parameter.copy_(archive.weight(name).view_as(parameter))
    return policy


def main() -> None:
    """Export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: that of the run")
    parser.add_argument("--merge-lora", action="store_true", help="fold adapters into their base model")
    options = parser.parse_args()
    discover()
    with cli.errors_in_one_line():
        saved = find(options.checkpoint)
        policy = load(saved, dtype=options.dtype)
        if options.merge_lora and policy.base is not None:
            policy = dataclasses.replace(policy, model=policy.model.merge_and_unload(), base=None)
        save_policy(policy, options.out)
        print(f"step {saved.step} -> {options.out}")


if __name__ == "__main__":
    main()
