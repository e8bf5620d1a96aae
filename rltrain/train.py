"""Train a policy with RL.

python -m rltrain.train +experiment=NAME [key=value …]
"""

from __future__ import annotations

from rltrain import cli
from rltrain.config import RunConfig


def main(config: RunConfig) -> None:
    """Train, and leave the process group cleanly."""
    # Imported here so that --help and config errors need no more than torch.
    from rltrain import dist
    from rltrain.trainer import fit

    try:
        fit(config)
    finally:
        dist.teardown()


if __name__ == "__main__":
    cli.run(main)
