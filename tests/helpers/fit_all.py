"""Several runs one after another in a process, so that ranks start once; the argument is a JSON list of overrides."""

import json
import sys

from rltrain import cli, trainer

if __name__ == "__main__":
    for overrides in json.loads(sys.argv[1]):
        trainer.fit(cli.compose(overrides))
