"""`vllm serve` over HTTP: several servers that all ranks share, any of which may die and come back.

Weights go to them over NCCL (:mod:`rltrain.rollout.vllm_nccl`) or as files on shared storage. A server is used only
with the newest weights: each answer names the weights it was sampled with, and a server that was restarted gets them
before it is asked again. Requests that a dead server took along are sent to the others; every call has a deadline. The
endpoints are those of ``scripts/vllm_server.sh`` (docs/vllm.md).
"""

from __future__ import annotations

import http.client
import itertools
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from rltrain.errors import RunError, require
from rltrain.rollout import RolloutLost
from rltrain.rollout.vllm_nccl import Channel, broadcast_all, takes_nccl
from rltrain.rollout.vllm_requests import Request, Sampled
from rltrain.rollout.vllm_weights import Weight, WeightFolder, checkpoint_weights, list_weights
from rltrain.runtime import dist

log = logging.getLogger(__name__)

HEALTH_S = 10.0
POLL_S = 1.0
TOKENS_OF_A_DEADLINE = 4096  # that many new tokens are within rollout.request_s; more have longer, in proportion
BYTES_OF_A_DEADLINE = 16 * 2**30  # so many bytes of weights are loaded within rollout.request_s
MAX_FRUITLESS_PASSES = 3  # in a row: servers that say they are well and answer nothing

# Straight to the server, whatever proxy the environment names.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerDown(Exception):
    """A server that cannot be used now; the message names its address and the cause."""


class Server:
    """One address."""

    def __init__(self, url: str, *, request_s: float) -> None:
        self.url = url.rstrip("/")
        self._request_s = request_s

    def call(self, path: str, body: Any = None, *, post: bool = True, deadline_s: float | None = None) -> Any:
        """The JSON answer; :class:`ServerDown` if there is none in time, RunError if the server refuses the request."""
        data = json.dumps(body or {}).encode() if post else None
        request = urllib.request.Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        try:
            with _opener.open(request, timeout=deadline_s or self._request_s) as response:
                return json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            detail = error.read()[:500].decode(errors="replace")
            if error.code < 500:
                raise RunError(
                    f"{self.url}{path}: refused with {error.code} ({detail}); start the server with "
                    "scripts/vllm_server.sh"
                ) from None
            raise ServerDown(f"{self.url}{path}: {error.code} ({detail})") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerDown(f"{self.url}{path}: {error or type(error).__name__}") from None

    def version(self) -> str:
        """The name of the weights that a healthy server has."""
        self.call("/health", post=False, deadline_s=HEALTH_S)
        return self.call("/weight_info", post=False)["weight_version"]

    def ready(self, weights: Path, *, nbytes: int) -> None:
        """Healthy, and with these weights."""
        if self.version() != weights.name:
            self.load(weights, nbytes=nbytes)

    def load(self, weights: Path, *, nbytes: int) -> None:
        """Put new weights in place between two batches, and forget what was cached under the old ones."""
        self.call("/pause?mode=wait")
        taken = {"method": "take_weights", "kwargs": {"weights_path": str(weights)}}
        self.call("/collective_rpc", taken, deadline_s=self.loading_s(nbytes))
        if not self.call("/reset_prefix_cache")["success"]:
            raise ServerDown(f"{self.url}/reset_prefix_cache: blocks are still held")
        self.call("/update_weight_version", {"new_version": weights.name})
        self.call("/resume")

    def completion_s(self, max_tokens: int) -> float:
        """The deadline of a completion of up to ``max_tokens`` tokens."""
        return self._request_s * max(1.0, max_tokens / TOKENS_OF_A_DEADLINE)

    def loading_s(self, nbytes: int) -> float:
        """The deadline of taking over weights of ``nbytes`` bytes."""
        return self._request_s * max(1.0, nbytes / BYTES_OF_A_DEADLINE)

    def sample(self, request: Request, fields: dict[str, Any], version: str) -> Sampled:
        """One completion, sampled with the weights ``version`` from its first token to its last."""
        fields = {**fields, **request.fields, "seed": request.seed}
        asked = {"token_ids": list(request.prompt_ids), "sampling_params": fields}
        deadline_s = self.completion_s(fields["max_tokens"])
        (choice,) = self.call("/inference/v1/generate", asked, deadline_s=deadline_s)["choices"]
        versions = [span["version"] for span in choice["weight_versions"] or []]
        if versions != [version]:
            raise ServerDown(f"{self.url}: sampled with the weights {versions}, not {version}; was it restarted?")
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerDown(f"{self.url}: a completion ended with '{choice['finish_reason']}'")
        logprobs = tuple(float(entry["logprob"]) for entry in choice["logprobs"]["content"])
        return Sampled(token_ids=tuple(choice["token_ids"]), logprobs=logprobs)

    def refuse_unfit(self, *, longest: int) -> None:
        """A server whose context is too short, or whose log-probs are not of the distribution it samples from.

        The latter shows with ``top_k=1``: the one token that is left has log-prob 0.
        """
        served = self.call("/v1/models", post=False)["data"][0]
        if served["max_model_len"] < longest:
            raise RunError(
                f"{self.url}: its context of {served['max_model_len']} tokens is below sampling.max_prompt_tokens + "
                f"max_new_tokens = {longest}; restart it with --max-model-len {longest}"
            )
        fields = {"top_k": 1, "temperature": 1.0, "max_tokens": 1, "logprobs": 0, "detokenize": False}
        # Ids of any vocabulary; not 0, which is often padding whose embedding of zeros leaves all logits equal.
        (choice,) = self.call("/inference/v1/generate", {"token_ids": [2, 3], "sampling_params": fields})["choices"]
        if choice["logprobs"]["content"][0]["logprob"] != 0:
            raise RunError(f"{self.url}: restart it with --logprobs-mode processed_logprobs")


class Servers:
    """The engine of ``rollout.mode=server``: ``sample`` on all servers that are up, ``push`` to every one."""

    def __init__(
        self,
        urls: Sequence[str],
        folder: Path,
        *,
        request_s: float,
        restart_s: float,
        max_requests: int,
        longest: int,
        weights: str = "files",
    ) -> None:
        require(
            weights != "nccl" or torch.cuda.is_available(),
            "rollout.weights=nccl: the trainer has no GPU; set rollout.weights=files, or auto to choose by the devices",
        )
        self._servers = [Server(url, request_s=request_s) for url in urls]
        self._restart_s, self._max_requests, self._longest = restart_s, max_requests, longest
        self._folder, self._weights = WeightFolder(folder), Path()
        self._checked: set[Server] = set()
        self._down: dict[Server, str] = {}
        self._lock = threading.Lock()  # continuations may be asked for while a thread samples ahead
        self._route, self._nbytes = weights, 0
        self._channels: dict[Server, Channel] = {}

    def push(self, model: Any) -> None:
        """Hand the weights to every server; one that cannot take them is named and asked again later."""
        weights = list_weights(model)
        self._nbytes = sum(weight.nbytes for weight in weights)
        self._decide_route()
        before = dict.fromkeys(self._servers, "has not been asked")
        if self._route == "nccl":
            self._weights, self._down = self._folder.next_version(), before
            self._broadcast(model, weights)
        else:
            self._weights, self._down = self._folder.write(model), before
        if dist.is_main():
            self._bring_up()
            if self._route == "files":
                self._folder.keep_only(self._weights)
        dist.barrier("weights pushed to the vLLM servers")

    def _decide_route(self) -> None:
        """Turn ``auto`` into a route, for the whole run: NCCL where trainer and every server that answers can."""
        if self._route != "auto":
            return
        over_nccl = dist.is_main() and torch.cuda.is_available() and all(map(self._takes_nccl, self._servers))
        self._route = "nccl" if dist.gather_objects(over_nccl, name="the route of the weights")[0] else "files"
        if dist.is_main():
            log.info("weights go to the vLLM servers %s", "over NCCL" if self._route == "nccl" else "as files")

    def _takes_nccl(self, server: Server) -> bool:
        try:
            return takes_nccl(server)
        except (ServerDown, RunError):
            return False

    def _broadcast(self, model: Any, weights: Sequence[Weight]) -> None:
        """Rank 0 sends each weight to the servers that are up while all ranks hold it whole."""
        channels = self._join() if dist.is_main() else []
        with ThreadPoolExecutor(max(1, len(channels))) as pool:
            started = [channel for channel in channels if self._tried(channel, channel.start, pool, weights)]
            broadcast_all(started, weights, checkpoint_weights(model))
            for channel in started:
                self._tried(channel, channel.finish, self._weights.name)

    def _join(self) -> list[Channel]:
        """The channels to all servers that are up. A server that has lost its weights was restarted, and joins anew."""
        for server in self._servers:
            try:
                joined = self._channels.get(server)
                if joined is None or server.version() != joined.version:
                    self._channels.pop(server, None)
                    server.version()  # healthy, or joining would wait for it
                    self._channels[server] = Channel(server, deadline_s=server.loading_s(self._nbytes))
            except ServerDown as error:
                self._mark(server, error)
        return [channel for server, channel in self._channels.items() if self._down[server] == "has not been asked"]

    def _tried(self, channel: Channel, call: Callable[..., None], *arguments: Any) -> bool:
        """Whether a call to a channel's server succeeded; else the server is down, and joins anew at the next push."""
        try:
            call(*arguments)
        except ServerDown as error:
            server = next(server for server, found in self._channels.items() if found is channel)
            del self._channels[server]
            self._mark(server, error)
            return False
        return True

    def awake(self) -> AbstractContextManager[None]:
        """Servers do not sleep."""
        return nullcontext()

    def sample(self, requests: Sequence[Request], fields: dict[str, Any]) -> list[Sampled]:
        """One answer per request, in order. :class:`RolloutLost` on every rank if any of them found no server."""
        answers: list[Sampled | None] = [None] * len(requests)
        lost = None
        try:
            self._fill(answers, requests, fields)
        except RolloutLost as error:
            lost = str(error)
        lost_anywhere = [one for one in dist.gather_objects(lost, name="completions of every rank") if one]
        if lost_anywhere:
            raise RolloutLost(lost_anywhere[0])
        return [answer for answer in answers if answer is not None]

    def _fill(self, answers: list[Sampled | None], requests: Sequence[Request], fields: dict[str, Any]) -> None:
        """Pass after pass over what is not answered yet, each on the servers that are up then."""
        fruitless = 0
        for turn in itertools.count():
            open_requests = [index for index, answer in enumerate(answers) if answer is None]
            if not open_requests:
                return
            servers = self._up()
            # With each pass the places move on, so that a request does not stay with a server that is up but fails.
            chosen = [servers[(place + turn) % len(servers)] for place in range(len(open_requests))]
            with ThreadPoolExecutor(self._max_requests) as pool:
                asked = [requests[index] for index in open_requests]
                found = list(pool.map(self._attempt, chosen, asked, itertools.repeat(fields)))
            for index, answer in zip(open_requests, found, strict=True):
                answers[index] = answer
            fruitless = 0 if any(found) else fruitless + 1
            if fruitless >= MAX_FRUITLESS_PASSES:
                raise RolloutLost(f"vLLM servers are up but answer nothing: {self._causes()}")

    def _attempt(self, server: Server, request: Request, fields: dict[str, Any]) -> Sampled | None:
        """An answer, or None if the server is down or goes down."""
        if server in self._down:
            return None
        try:
            return server.sample(request, fields, self._weights.name)
        except ServerDown as error:
            self._mark(server, error)
            return None

    def _up(self) -> list[Server]:
        """The servers that can be asked now; waits up to ``restart_s`` for the first of them."""
        start_s = time.monotonic()
        while True:
            self._bring_up()
            if up := [server for server in self._servers if server not in self._down]:
                return up
            if time.monotonic() - start_s > self._restart_s:
                raise RolloutLost(
                    f"no vLLM server came back within rollout.restart_s={self._restart_s:g}: {self._causes()}"
                )
            time.sleep(POLL_S)

    def _bring_up(self) -> None:
        """Ask the servers that are down, side by side, whether they are well; those that are get the weights."""
        with self._lock, ThreadPoolExecutor(len(self._servers)) as pool:
            list(pool.map(self._try, list(self._down)))

    def _try(self, server: Server) -> None:
        try:
            if self._route == "nccl":
                self._refuse_old(server)
            else:
                server.ready(self._weights, nbytes=self._nbytes)
            if server not in self._checked:
                server.refuse_unfit(longest=self._longest)
                self._checked.add(server)
        except ServerDown as error:
            self._mark(server, error)
        else:
            self._down.pop(server, None)

    def _refuse_old(self, server: Server) -> None:
        """No file holds the weights, so a server that was restarted waits for those of the next step."""
        if server.version() != self._weights.name:
            raise ServerDown(f"{server.url}: has other weights, and gets new ones over NCCL with the next push")

    def _mark(self, server: Server, error: ServerDown) -> None:
        """Note that a server is down, and why; say so once."""
        if self._down.get(server) != str(error):
            log.warning("vLLM server down: %s", error)
        self._down[server] = str(error)

    def _causes(self) -> str:
        return "; ".join(self._down.values())
