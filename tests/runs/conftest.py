"""Fixtures of several whole-run tests."""

import dataclasses

import pytest
from vllm_stand_in import StandIn, tiny_model

from rltrain.policy.load import load_policy


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
