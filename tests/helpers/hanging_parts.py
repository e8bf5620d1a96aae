"""Parts that never come back: ``python hanging_parts.py train|evaluate [key=value …]``."""

import importlib
import sys
import time
from dataclasses import dataclass

from rltrain import cli
from rltrain.config import RewardConfig
from rltrain.registry import register
from rltrain.rollout.local import LocalRollout, LocalRolloutConfig


@dataclass(kw_only=True)
class SleepingConfig(RewardConfig):
    """Rewards nothing, ever."""


@register("reward", "sleeping", SleepingConfig)
def sleeping(groups, config, context):
    time.sleep(1000)


@dataclass(kw_only=True)
class HangingConfig(LocalRolloutConfig):
    """Samples nothing, ever."""


@register("rollout", "hanging", HangingConfig)
class HangingRollout(LocalRollout):
    def generate(self, prompts, *, step, group_size, sampling=None):
        time.sleep(1000)


if __name__ == "__main__":
    cli.run(importlib.import_module(f"rltrain.{sys.argv.pop(1)}").main)
