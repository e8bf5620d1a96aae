"""Weights on their way to servers: files shared out among ranks, deadlines by size, and vLLM's protocol over NCCL."""

import json
import logging
import threading

import pytest
import torch
from safetensors.torch import load_file
from vllm_stand_in import UNKNOWN, Nccl, StandIn, tiny_model

from rltrain.errors import ConfigError
from rltrain.policy.load import load_policy
from rltrain.rollout import vllm_nccl
from rltrain.rollout.vllm import VllmRolloutConfig
from rltrain.rollout.vllm_requests import Request
from rltrain.rollout.vllm_server import BYTES_OF_A_DEADLINE, Server, Servers
from rltrain.rollout.vllm_weights import Weight, in_files, list_weights, write_files
from rltrain.runtime import dist

FIELDS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_tokens": 4, "stop_token_ids": [1], "logprobs": 0}
REQUESTS = [Request(prompt_ids=(7, 8, 9), seed=3)]


@pytest.fixture
def serve():
    running = []

    def start(**options):
        running.append(StandIn(load_policy(tiny_model()).model, **options))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def nccl(monkeypatch):
    """Both sides have GPUs, as far as the choice of the route goes; tensors stay on the CPU."""
    monkeypatch.setattr(vllm_nccl, "nccl", Nccl)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "device", lambda: torch.device("cpu"))


def engine(tmp_path, *stand_ins, weights="auto", restart_s=0.0):
    options = {"request_s": 60.0, "restart_s": restart_s, "max_requests": 4, "longest": 100}
    return Servers([one.url for one in stand_ins], tmp_path / "weights", weights=weights, **options)


def changed_policy():
    policy = load_policy(tiny_model())
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.01)
    return policy


def weight(elements: int) -> Weight:
    return Weight(name=f"w{elements}", dtype=torch.bfloat16, shape=(elements,), parameters=[], whole=torch.Tensor)


@pytest.mark.parametrize(
    ("ranks", "file_bytes", "expected"),
    [
        (1, 1000, [[3, 4, 2, 1]]),
        (1, 14, [[3, 4], [2, 1]]),  # 2 bytes an element
        (1, 4, [[3], [4], [2], [1]]),
        (2, 1000, [[3], [4], [2, 1]]),  # 20 bytes, so 10 a rank
    ],
)
def test_files_hold_weights_in_order_up_to_a_size_and_a_rank_has_a_share(ranks, file_bytes, expected):
    found = in_files([weight(n) for n in (3, 4, 2, 1)], ranks=ranks, file_bytes=file_bytes)
    assert [[one.shape[0] for one in file] for file in found] == expected


def test_every_rank_writes_its_files_and_together_they_are_the_model(tmp_path, monkeypatch):
    model = load_policy(tiny_model()).model
    monkeypatch.setattr(dist, "world_size", lambda: 3)
    written = []
    for rank in (2, 1, 0):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        before = {path.name for path in tmp_path.glob("*.safetensors")}
        write_files(tmp_path, model)
        written.append({path.name for path in tmp_path.glob("*.safetensors")} - before)
    assert all(written) and not written[0] & written[1] | written[1] & written[2] | written[0] & written[2]
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    expected = dict(model.named_parameters())
    assert places.keys() == expected.keys()
    for name, file in places.items():
        assert torch.equal(load_file(tmp_path / file)[name], expected[name])


def test_the_deadline_of_loading_grows_with_the_weights():
    server = Server("http://nowhere:1", request_s=600.0)
    assert server.loading_s(BYTES_OF_A_DEADLINE // 2) == 600.0
    assert server.loading_s(3 * BYTES_OF_A_DEADLINE) == 1800.0


def test_weights_go_over_nccl_where_both_sides_have_gpus(tmp_path, serve, nccl):
    one, two = serve(gpu=True), serve(gpu=True)
    policy = changed_policy()
    over_nccl, as_files = engine(tmp_path / "a", one, two), engine(tmp_path / "b", serve(), weights="files")
    over_nccl.push(policy.model)
    as_files.push(policy.model)
    assert over_nccl.sample(REQUESTS, FIELDS) == as_files.sample(REQUESTS, FIELDS)
    for server in (one, two):
        for name, expected in policy.model.named_parameters():
            assert torch.equal(server.model.get_parameter(name), expected), name
    assert one.version == two.version != UNKNOWN and not one.paused
    assert not (tmp_path / "a").exists()


def test_a_second_push_uses_the_communicator_of_the_first(tmp_path, serve, nccl):
    server, policy = serve(gpu=True), changed_policy()
    pushed = engine(tmp_path, server)
    pushed.push(policy.model)
    wire = server.wire
    pushed.push(policy.model)
    assert server.wire is wire and len(set(server.pushes)) == 2


def test_a_restarted_server_waits_for_the_next_push_and_joins_anew(tmp_path, serve, nccl, caplog):
    first, steady, policy = serve(gpu=True), serve(gpu=True), changed_policy()
    pushed = engine(tmp_path, first, steady)
    pushed.push(policy.model)
    first.stop()
    second = serve(gpu=True, port=first.server_port)
    with caplog.at_level(logging.WARNING):
        assert len(pushed.sample(REQUESTS * 4, FIELDS)) == 4
    assert second.pushes == [] and second.version == UNKNOWN
    pushed.push(policy.model)
    assert second.version == steady.version and len(second.pushes) == 1


def test_a_server_that_does_not_join_is_named_and_the_others_get_weights(tmp_path, serve, nccl, monkeypatch, caplog):
    """NCCL waits for it without an end, and the push must not."""
    refusing, steady, policy = serve(gpu=True, joins=False), serve(gpu=True), changed_policy()
    over, ids, waited = threading.Event(), [], []
    unique_id, init_rank = Nccl.unique_id, Nccl.init_rank

    def wait_for_all(ranks, made, rank):
        if made == ids[0] and not over.wait(20):
            waited.append("to the end")
        return init_rank(ranks, made, rank)

    monkeypatch.setattr(Nccl, "unique_id", lambda: ids.append(unique_id()) or ids[-1])
    monkeypatch.setattr(Nccl, "init_rank", wait_for_all)
    pushed = engine(tmp_path, refusing, steady)
    try:
        with caplog.at_level(logging.WARNING):
            pushed.push(policy.model)
        assert len(ids) == 2 and not waited
    finally:
        over.set()
    assert "init_weight_transfer_engine: 500" in caplog.text
    assert steady.version != UNKNOWN and len(pushed.sample(REQUESTS, FIELDS)) == 1


def test_a_server_without_weight_transfer_makes_all_of_them_read_files(tmp_path, serve, nccl):
    able, plain = serve(gpu=True), serve()
    pushed = engine(tmp_path, able, plain)
    pushed.push(changed_policy().model)
    assert able.wire is None and able.pushes == plain.pushes and (tmp_path / "weights").exists()


def test_nccl_without_a_gpu_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"rollout.weights=nccl: the trainer has no GPU; set rollout.weights=files"):
        engine(tmp_path, weights="nccl")


def test_an_unknown_route_is_refused():
    with pytest.raises(ConfigError, match=r"rollout.weights=ftp: unknown; set one of auto, nccl, files"):
        VllmRolloutConfig(weights="ftp")


def test_what_is_declared_is_what_is_sent():
    model = load_policy(tiny_model()).model
    found = vllm_nccl.declared(list_weights(model))
    parameters = dict(model.named_parameters())
    assert found["names"] == list(parameters) and set(found["dtype_names"]) == {"float32"}
    assert found["shapes"] == [list(parameter.shape) for parameter in parameters.values()]
