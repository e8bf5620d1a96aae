"""The real vLLM, in this process and as a server: `make test-vllm`. One engine of each kind: they start slowly."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch
from tiny_run import config

from rltrain.config import SamplingConfig
from rltrain.evaluate import held_out_prompts
from rltrain.policy.load import load_policy
from rltrain.rollout.local import LocalRollout, LocalRolloutConfig
from rltrain.rollout.vllm import VllmRollout, VllmRolloutConfig
from rltrain.rollout.vllm_weights import describe
from rltrain.runtime import dist

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4
SAMPLING = SamplingConfig(temperature=0.8, max_new_tokens=24, max_prompt_tokens=32)
# vLLM's CPU kernels know heads of 32 numbers, not of the 16 that tiny_run has.
MODEL = ["model.hidden_size=64", "model.intermediate_size=128"]


def disturb(policy, seed):
    """Weights that are not those of any start, and give peaked distributions."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.08)


@pytest.fixture(scope="module")
def policy():
    loaded = load_policy(config(Path("unused"), *MODEL).model)
    disturb(loaded, seed=1)
    return loaded


@pytest.fixture(scope="module")
def prompts(policy):
    return held_out_prompts(config(Path("unused"), *MODEL), policy)[:4]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_up(url):
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def server(policy, tmp_path_factory):
    """Its address, and the process of scripts/vllm_server.sh, which starts vLLM again when it dies."""
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    describe(policy, folder)
    arguments = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "400"]
    arguments += ["--kv-cache-memory-bytes", str(2**27)]
    environment = os.environ | {"VLLM_PYTHON": sys.executable, "SERVER_HOST": "127.0.0.1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            ["scripts/vllm_server.sh", str(folder), str(port), *arguments],
            cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    yield f"http://127.0.0.1:{port}", process
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)


@pytest.fixture(scope="module", params=["colocated", "server"])
def rollout(request, policy, tmp_path_factory):
    dist.setup(deadline_s=600)
    options = {"folder": str(tmp_path_factory.mktemp("exchange")), "cache_gib": 0.125}
    if request.param == "server":
        options |= {"mode": "server", "urls": [request.getfixturevalue("server")[0]]}
    return VllmRollout(VllmRolloutConfig(**options), SAMPLING, policy, seed=3)


def own_logprobs(policy, prompt, completion, temperature):
    ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
    with torch.no_grad():
        logits = policy.model(input_ids=ids).logits[0] / temperature
    logprobs = logits.log_softmax(-1)[len(prompt.token_ids) - 1 : -1]
    return logprobs.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]


def differences(policy, groups, temperature=SAMPLING.temperature):
    """|engine's - policy's log-prob| of every token."""
    pairs = [(group.prompt, one) for group in groups for one in group.completions]
    return torch.cat(
        [(torch.tensor(one.logprobs) - own_logprobs(policy, prompt, one, temperature)).abs() for prompt, one in pairs]
    )


def test_sampled_logprobs_are_the_policys(rollout, policy, prompts):
    groups = rollout.generate(prompts, step=1, group_size=8)
    assert differences(policy, groups).max() < TOLERANCE
    assert len({one.token_ids for one in groups[0].completions}) > 1


def test_greedy_tokens_are_the_local_engines(rollout, policy, prompts):
    greedy = dataclasses.replace(SAMPLING, temperature=0.0)
    local = LocalRollout(LocalRolloutConfig(), greedy, policy, seed=0)
    expected = local.generate(prompts, step=0, group_size=1)
    assert rollout.generate(prompts, step=0, group_size=1, sampling=greedy) == expected


def test_a_repeated_step_gives_the_same_completions(rollout, prompts):
    first, again = (rollout.generate(prompts, step=2, group_size=4) for _ in range(2))
    alone = [rollout.generate([prompt], step=2, group_size=4)[0] for prompt in prompts]
    ids = [group.completion_ids for group in first]
    assert [group.completion_ids for group in again] == ids
    assert [group.completion_ids for group in alone] == ids
    assert [group.completion_ids for group in rollout.generate(prompts, step=3, group_size=4)] != ids


def test_completions_stop_as_local_ones_do(rollout, policy, prompts):
    """Greedy, with a stop string taken from the middle of what is said without one."""
    greedy = dataclasses.replace(SAMPLING, temperature=0.0)
    said = rollout.generate(prompts[:1], step=0, group_size=1, sampling=greedy)[0].completions[0].text
    stopping = dataclasses.replace(greedy, stop=[said[5:7]])
    local = LocalRollout(LocalRolloutConfig(), stopping, policy, seed=0)
    expected = local.generate(prompts, step=0, group_size=1)
    assert expected[0].completions[0].finish == "stop"
    assert rollout.generate(prompts, step=0, group_size=1, sampling=stopping) == expected


@pytest.mark.parametrize("seed", [11, 12])
def test_after_a_push_the_logprobs_are_the_new_policys(rollout, policy, prompts, seed):
    before = rollout.generate(prompts, step=1, group_size=8)
    disturb(policy, seed)
    assert differences(policy, before).max() > 0.1
    rollout.sync(policy)
    assert differences(policy, rollout.generate(prompts, step=1, group_size=8)).max() < TOLERANCE


def kill_engine(shell):
    """SIGKILL what the script has started, in the middle of its work."""
    for process in psutil.Process(shell.pid).children(recursive=True):
        process.kill()


def test_a_killed_server_is_survived(server, policy, prompts, tmp_path, caplog):
    """The step is finished by the server that takes its place, which also repeats all of it: the same completions."""
    url, shell = server
    sampling = dataclasses.replace(SAMPLING, max_new_tokens=300)
    settings = VllmRolloutConfig(mode="server", urls=[url], folder=str(tmp_path))
    rollout = VllmRollout(settings, sampling, policy, seed=3)
    expected = rollout.generate(prompts, step=5, group_size=16)
    killer = threading.Timer(0.5, kill_engine, [shell])
    killer.start()
    survived = rollout.generate(prompts, step=5, group_size=16)
    killer.join()
    again = rollout.generate(prompts, step=5, group_size=16)
    for groups in (survived, again):
        assert [group.completion_ids for group in groups] == [group.completion_ids for group in expected]
    assert f"vLLM server down: {url}" in caplog.text
    assert differences(policy, survived).max() < TOLERANCE
