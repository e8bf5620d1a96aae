"""Train a policy with RL.

python -m rltrain.train +experiment=NAME [key=value …]
"""

from __future__ import annotations

from rltrain import cli
from rltrain.config import RunConfig


def main(config: RunConfig) -> None:
    """Train."""
    # Imported here so that --help and config errors need no more than torch.
    from rltrain.trainer import fit

    fit(config)


if __name__ == "__main__":
    cli.run(main)
