"""One thread, no network, no accounts, one seed: what makes a test's result its own."""

import importlib.util
import os
import shutil

# Before torch and the hub's clients are imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
import torch
from hypothesis import settings

# Shared machines are slow at times, so no test has a clock; a failure must be the same on every machine.
settings.register_profile("rltrain", deadline=None, derandomize=True)
settings.load_profile("rltrain")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config, items):
    reasons = {
        "slow": None if config.getoption("--slow") else "runs with --slow",
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "vllm": None if importlib.util.find_spec("vllm") else "runs with make test-vllm",
        "slurm": None if all(map(shutil.which, ("slurmctld", "slurmd", "munged"))) else "needs Slurm's daemons",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from the same seed and thread count, whichever tests ran before it in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
