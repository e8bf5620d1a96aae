"""Services that get the numbers of ``metrics.jsonl`` too: wandb, TensorBoard, trackio."""

from __future__ import annotations

import importlib.util

from rltrain.config import TrackingConfig
from rltrain.errors import require
from rltrain.runs.trackers.base import TrackedRun, Tracker
from rltrain.runs.trackers.tensorboard import TensorboardTracker
from rltrain.runs.trackers.trackio import TrackioTracker
from rltrain.runs.trackers.wandb import WandbTracker, wandb_mode


def check(config: TrackingConfig) -> None:
    """ConfigError for a tracker whose package is not installed."""
    for package, is_chosen in (("tensorboard", config.tensorboard), ("trackio", config.trackio)):
        is_missing = is_chosen and importlib.util.find_spec(package) is None
        require(not is_missing, f"tracking.{package}=true: the package is not installed; pip install {package}")


def started(config: TrackingConfig, run: TrackedRun) -> list[Tracker]:
    """The trackers that the config asks for, started."""
    chosen: list[Tracker] = []
    if wandb_mode(config.wandb) != "disabled":
        chosen.append(WandbTracker(run))
    if config.tensorboard:
        chosen.append(TensorboardTracker(run))
    if config.trackio:
        chosen.append(TrackioTracker(run))
    return chosen
