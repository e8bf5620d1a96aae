"""What a finished or running run left: weights, metrics."""

import time

import torch
from safetensors.torch import load_file
from tiny_run import metrics

from rltrain.runs import checkpoint


def final_weights(run_dir) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.list_checkpoints(run_dir)[-1].policy / "model.safetensors")


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def metrics_if_any(run_dir) -> list[dict]:
    return metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []


def wait_for(condition, process, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "the run did not get there"
        time.sleep(0.05)
