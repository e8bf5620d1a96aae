"""Weights to vLLM servers over NCCL, by vLLM's own weight-transfer protocol, written after the sources of vLLM 0.32.

The trainer needs no vLLM: a unique id of NCCL travels over HTTP, the workers of a server and the trainer's rank 0 join
a communicator, add up one number, and then every weight is a broadcast from rank 0, in the order in which names,
precisions and shapes were declared. Each server has its communicator, so that a restarted one joins anew alone.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.cuda import nccl

from rltrain.rollout.vllm_weights import Weight
from rltrain.runtime import dist

BACKEND = "nccl"


class Caller(Protocol):
    """A server that answers HTTP calls."""

    url: str

    def call(self, path: str, body: Any = None, *, post: bool = True, deadline_s: float | None = None) -> Any:
        """The JSON answer."""
        ...


def takes_nccl(server: Caller) -> bool:
    """Whether the server was started with ``--weight-transfer-config '{"backend": "nccl"}'``."""
    config = server.call("/server_info?config_format=json", post=False)["vllm_config"]
    return (config.get("weight_transfer_config") or {}).get("backend") == BACKEND


def declared(weights: Sequence[Weight]) -> dict[str, list[Any]]:
    """What a server must know before the first byte comes: vLLM's ``NCCLWeightTransferUpdateInfo``."""
    return {
        "names": [weight.name for weight in weights],
        "dtype_names": [str(weight.dtype).removeprefix("torch.") for weight in weights],
        "shapes": [list(weight.shape) for weight in weights],
    }


class Channel:
    """A communicator with the workers of a server, whose ranks follow the trainer's 0."""

    def __init__(self, server: Caller, *, deadline_s: float) -> None:
        self.server, self._deadline_s = server, deadline_s
        workers = server.call("/get_world_size", post=False)["world_size"]
        unique_id = nccl.unique_id()
        joining = {"rank_offset": 1, "world_size": 1 + workers, "packed": False}
        joining["nccl_unique_id_b64"] = base64.b64encode(unique_id).decode()
        with ThreadPoolExecutor(1) as pool:
            joined = pool.submit(server.call, "/init_weight_transfer_engine", {"init_info": joining})
            self._communicator = _communicator(1 + workers, unique_id, joined)
        self._receiving: Future[Any] | None = None
        self.version = ""  # of the weights that were sent last

    def start(self, pool: ThreadPoolExecutor, weights: Sequence[Weight]) -> None:
        """Pause the server between two batches and let it wait for the weights, which come while the call is open."""
        self.server.call("/pause?mode=wait")
        self.server.call("/start_weight_update")
        update = {"update_info": declared(weights)}
        self._receiving = pool.submit(self.server.call, "/update_weights", update, deadline_s=self._deadline_s)

    @property
    def listens(self) -> bool:
        """False once the server has answered: with an error, because not all weights were sent yet."""
        return self._receiving is not None and not self._receiving.done()

    def broadcast(self, tensor: Tensor) -> None:
        """Send a weight, in the order of the device's current stream."""
        nccl.broadcast([tensor], root=0, comms=[self._communicator])

    def finish(self, version: str) -> None:
        """Wait until the server has all weights, and set it to work with them."""
        assert self._receiving is not None
        self._receiving.result()
        self.server.call("/finish_weight_update", {"weight_version": version}, deadline_s=self._deadline_s)
        self.server.call("/reset_prefix_cache")
        self.server.call("/resume")
        self.version = version


def _communicator(ranks: int, unique_id: bytes, joined: Future[Any]) -> Any:
    """The communicator as its rank 0, once the server has joined it, too.

    NCCL waits for the other ranks without an end. So it waits in a thread, which a server's refusal leaves behind.
    """
    made: Future[Any] = Future()
    device = dist.device()

    def join() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has its own
            communicator = nccl.init_rank(ranks, unique_id, 0)
            # vLLM's communicator adds up one number as soon as it is made, and waits for all ranks there.
            nccl.all_reduce([torch.zeros(1, device=device)], comms=[communicator])
            made.set_result(communicator)
        except Exception as error:  # raised by result()
            made.set_exception(error)

    threading.Thread(target=join, daemon=True).start()
    wait([made, joined], return_when=FIRST_EXCEPTION)
    if joined.done():
        joined.result()
    return made.result()


def broadcast_all(channels: Sequence[Channel], weights: Sequence[Weight], whole: Iterator[tuple[str, Tensor]]) -> None:
    """Send every weight to every server while it is whole; without channels a rank takes part in gathering alone."""
    for weight, (name, tensor) in zip(weights, whole, strict=True):
        assert weight.name == name
        if not channels:
            continue
        sent = tensor.to(dist.device()).contiguous()
        for channel in channels:
            if channel.listens:
                channel.broadcast(sent)
        if sent.is_cuda:
            torch.cuda.current_stream().synchronize()  # ZeRO frees the weight when the next one is asked for
