"""What a colocated engine asks of vLLM, in which order, on a stand-in for the library and for a GPU's memory."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from rltrain.errors import ConfigError
from rltrain.policy.load import load_policy
from rltrain.policy.tiny import TinyConfig
from rltrain.rollout.vllm_colocated import GIB, ColocatedEngine, memory_arguments, trained_share
from rltrain.rollout.vllm_requests import Request
from rltrain.runtime import dist

REQUESTS = [Request(prompt_ids=(1, 2), seed=7)]
# One layer: 4 projections and 2 norms of attention, 3 matrices of the MLP, 2 norms; and embedding and last norm.
WAKE = [("wake_up", ["weights"]), ("take_weights", 13), ("wake_up", ["kv_cache"]), "reset_prefix_cache"]
SAMPLE = [("generate", [[1, 2]]), ("sleep", 2)]


class LLM:
    """Writes down its calls."""

    def __init__(self, **arguments):
        self.calls, self.arguments = [], arguments
        finalizer = SimpleNamespace(detach=lambda: (None, lambda: None, (), {}))
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(_finalizer=finalizer))

    def wake_up(self, tags):
        self.calls.append(("wake_up", tags))

    def sleep(self, level):
        self.calls.append(("sleep", level))

    def collective_rpc(self, name, kwargs):
        self.calls.append((name, len(dict(kwargs["weights_iterator"]))))

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")

    def generate(self, prompts, parameters, use_tqdm):
        self.calls.append(("generate", [prompt["prompt_token_ids"] for prompt in prompts]))
        output = SimpleNamespace(token_ids=[3], logprobs=[{3: SimpleNamespace(logprob=-0.5)}])
        return [SimpleNamespace(outputs=[output]) for _ in prompts]


@pytest.fixture
def made(monkeypatch, tmp_path):
    """An engine that sleeps or not, and the model whose weights it gets."""

    def make(sleeps):
        library, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
        library.LLM, library.SamplingParams = LLM, lambda **fields: fields
        platforms.current_platform = SimpleNamespace(is_sleep_mode_available=lambda: sleeps)
        monkeypatch.setitem(sys.modules, "vllm", library)
        monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
        policy = load_policy(TinyConfig(hidden_size=16, layers=1, heads=2, intermediate_size=32))
        engine = ColocatedEngine(policy, tmp_path, longest=8, cache_gib=0.0, sleep=True, arguments={})
        return engine, policy.model

    return make


def test_weights_are_taken_before_the_cache_wakes_and_again_after_each_sleep(made):
    engine, model = made(sleeps=True)
    engine.push(model)  # the engine begins awake
    assert engine._llm.calls == [WAKE[1], WAKE[3]]
    for _ in range(2):  # the second without a push in between, as in dynamic sampling
        engine._llm.calls.clear()
        engine.sample(REQUESTS, {})
    assert engine._llm.calls == [*WAKE, *SAMPLE]
    engine._llm.calls.clear()
    engine.push(model)
    engine.sample(REQUESTS, {})
    assert engine._llm.calls == [*WAKE, *SAMPLE]


def test_a_rank_without_requests_sleeps_and_wakes_with_the_others(made):
    """Else the ranks that sampled would push again alone, and ZeRO 3 gathers the weights on all ranks together."""
    busy, model = made(sleeps=True)
    idle, _ = made(sleeps=True)
    for engine, requests in ((busy, REQUESTS), (idle, [])):
        engine.push(model)
        engine._llm.calls.clear()
        assert len(engine.sample(requests, {})) == len(requests)
        engine.sample(REQUESTS, {})
    assert busy._llm.calls == [*SAMPLE, *WAKE, *SAMPLE]
    assert idle._llm.calls == [SAMPLE[1], *WAKE, *SAMPLE]


def test_rounds_of_a_conversation_keep_the_engine_awake(made):
    """One push and one sleep for all rounds, so that the cache of prefixes serves the later ones."""
    engine, model = made(sleeps=True)
    engine.push(model)
    engine.sample(REQUESTS, {})
    engine._llm.calls.clear()
    with engine.awake():
        engine.sample(REQUESTS, {})
        engine.sample(REQUESTS, {})
    assert engine._llm.calls == [*WAKE, SAMPLE[0], *SAMPLE]


def test_an_engine_that_cannot_sleep_keeps_weights_and_cache(made):
    engine, model = made(sleeps=False)
    engine.push(model)
    engine.sample(REQUESTS, {})
    engine.sample(REQUESTS, {})
    assert engine._llm.calls == [WAKE[1], WAKE[3], SAMPLE[0], SAMPLE[0]]


def test_on_a_cpu_the_cache_has_a_size(made, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = made(sleeps=False)[0]._llm.arguments
    assert arguments["kv_cache_memory_bytes"] == 2 * GIB and "gpu_memory_utilization" not in arguments


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # (60 GiB - 12 x 1 Gi) / 80 GiB - 0.1 = 0.5
        ({"cache_gib": 0.0, "sleeps": True}, {"gpu_memory_utilization": 0.5}),
        ({"cache_gib": 8.0, "sleeps": True}, {"gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": 8 * GIB}),
        ({"cache_gib": 0.0, "sleeps": False}, {"gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": 2 * GIB}),
    ],
)
def test_the_share_is_of_what_is_free(options, expected):
    assert memory_arguments(60 * GIB, 80 * GIB, trained=GIB, **options) == expected


def test_a_gpu_that_the_trainer_fills_is_refused():
    with pytest.raises(ConfigError, match=r"rollout.mode=colocated: 20.0 of 80.0 GiB are free"):
        memory_arguments(20 * GIB, 80 * GIB, trained=GIB, cache_gib=0.0, sleeps=True)


def test_a_rank_keeps_room_for_its_shard_of_the_moments(monkeypatch):
    """1,000 parameters on 8 ranks: all of them at stage 0, 125 above. ZeRO 3 leaves an empty tensor and its shape."""
    model = torch.nn.Linear(99, 10)
    model.weight.ds_shape = torch.Size([10, 99])
    model.weight.data = torch.empty(0)
    monkeypatch.setattr(dist, "world_size", lambda: 8)
    assert [trained_share(model, stage) for stage in (0, 1, 3)] == [1000, 125, 125]
