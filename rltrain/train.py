"""Train a policy with RL.

python -m rltrain.train +experiment=NAME [key=value …]
"""

from __future__ import annotations

from pathlib import Path

from rltrain import cli
from rltrain.config import RunConfig


def main(config: RunConfig) -> None:
    """Train, alone in the run folder."""
    # Imported here so that --help and config errors need no more than torch.
    from rltrain.runs import run_folder
    from rltrain.runtime import dist
    from rltrain.trainer import fit

    dist.setup(deadline_s=config.deadline("collective"), join_s=config.deadline("join"))
    with run_folder.opened(Path(config.run_dir)):
        fit(config)


if __name__ == "__main__":
    cli.run(main)
