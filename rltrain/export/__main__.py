"""A run's policy as a plain transformers folder, or on the hub, with a model card that holds the run's table.

rltrain export runs/quickstart --to exported                  the newest intact checkpoint of the run
rltrain export runs/quickstart/checkpoints/step_000140 --to exported --dtype float32
rltrain export runs/lora --to exported --merge-lora           a whole model instead of adapters
rltrain export runs/quickstart --hub me/quickstart --private  needs `hf auth login`, or HF_TOKEN

The weights are the fp32 ones that the optimiser holds, so ``--dtype float32`` of a bf16 run loses nothing.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rltrain import cli
from rltrain.errors import ConfigError, require


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        prog="rltrain export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("run", type=Path, help="a run folder, or a checkpoint folder step_…")
    target = flags.add_mutually_exclusive_group(required=True)
    target.add_argument("--to", type=Path, metavar="FOLDER", help="write the folder here")
    target.add_argument("--hub", metavar="NAME", help="push to this model repository, made if it is not there")
    flags.add_argument("--private", action="store_true", help="make the repository a private one")
    flags.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: that of the run")
    flags.add_argument("--merge-lora", action="store_true", help="fold adapters into their base model")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Export."""
    flags = parser().parse_args(arguments)
    cli.setup_logging()
    with cli.errors_in_one_line():
        require(flags.run.is_dir(), f"{flags.run}: no such folder; give the folder of a run or a checkpoint")
        if flags.to is not None:
            step = write(flags, flags.to)
            print(f"step {step} -> {flags.to}")
            return
        from rltrain.export.hub import push

        with tempfile.TemporaryDirectory() as scratch:
            step = write(flags, Path(scratch))
            print(f"step {step} -> {push(Path(scratch), flags.hub, private=flags.private, step=step)}")


def write(flags: argparse.Namespace, folder: Path) -> int:
    """Model, tokenizer, card and the run's config into a folder. The step of the checkpoint."""
    from rltrain.export import checkpoint
    from rltrain.export.card import card
    from rltrain.policy.load import save_policy
    from rltrain.registry import discover

    discover()
    saved = checkpoint.find(flags.run)
    run_dir = saved.path.resolve().parent.parent
    policy = checkpoint.load(saved, dtype=flags.dtype, merge_lora=flags.merge_lora)
    try:
        save_policy(policy, folder)
        (folder / "README.md").write_text(card(run_dir, step=saved.step, adapters=policy.base is not None))
        if (run_dir / "config.yaml").exists():
            shutil.copy(run_dir / "config.yaml", folder / "config.yaml")
    except OSError as error:
        raise ConfigError(f"--to {folder}: cannot be written ({error.strerror}); choose another folder") from error
    return saved.step


if __name__ == "__main__":
    main()
