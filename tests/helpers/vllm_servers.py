"""Stand-ins for vLLM's servers, started and stopped."""

import dataclasses
import functools
from pathlib import Path

import pytest
from tiny_run import config
from vllm_stand_in import StandIn

from rltrain.policy.load import load_policy


@functools.cache
def tiny_model():
    return config(Path("unused")).model


@pytest.fixture
def serve():
    """Starts stand-ins for vLLM, each with other weights than the policy until it is pushed some."""
    started = []

    def start(**options):
        model = load_policy(dataclasses.replace(tiny_model(), init_seed=1)).model
        started.append(StandIn(model, **options))
        return started[-1]

    yield start
    for server in started:
        server.stop()
