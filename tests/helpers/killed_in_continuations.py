"""A run that dies by SIGKILL inside the continuations of a step, when the second pass of prefixes is forwarded.

python killed_in_continuations.py STEP OVERRIDE …
"""

import os
import signal
import sys

import torch

from rltrain import cli, trainer
from rltrain.runtime import watchdog


class Killer:
    """A hook before the forward of every module."""

    def __init__(self, step: int) -> None:
        self._stage, self._passes = f"continuations of step {step}", 0

    def __call__(self, module: torch.nn.Module, args: object) -> None:
        if isinstance(module, torch.nn.Embedding) and any(wait.name == self._stage for wait in watchdog._open):
            self._passes += 1
            if self._passes == 2:
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.nn.modules.module.register_module_forward_pre_hook(Killer(int(sys.argv[1])))
    trainer.fit(cli.compose(sys.argv[2:]))
