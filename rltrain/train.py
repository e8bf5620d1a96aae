"""Train a policy with RL.

python -m rltrain.train +experiment=NAME [key=value …]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rltrain import cli
from rltrain.config import RunConfig
from rltrain.errors import ConfigError
from rltrain.options import catalogue
from rltrain.runtime import progress


def main(config: RunConfig) -> None:
    """Train, alone in the run folder."""
    # Imported here so that --help and config errors need no more than torch.
    progress.say("start", "loading the libraries")
    from rltrain.runs import run_folder
    from rltrain.runtime import dist
    from rltrain.trainer import fit

    dist.setup(deadline_s=config.deadline("collective"), join_s=config.deadline("join"))
    with run_folder.opened(Path(config.run_dir)):
        progress.say("start", f"{config.name}: {config.steps} steps, in {config.run_dir}")
        fit(config)


def refuse_no_arguments(arguments: Sequence[str]) -> None:
    """Without a choice there is nothing to train: show the experiments."""
    if not arguments:
        print(catalogue.table(only="experiments"))
        raise ConfigError("nothing is chosen; give +experiment=NAME, or model=, data= and reward@rewards.answer=")


if __name__ == "__main__":
    with cli.errors_in_one_line():
        refuse_no_arguments(sys.argv[1:])
    cli.run(main)
