"""`vllm serve` over HTTP: several servers that all ranks share, any of which may die and come back.

A server is used only with the newest weights: each answer names the weights it was sampled with, and a server that was
restarted gets them before it is asked again. Requests that a dead server took along are sent to the others; every call
has a deadline. The endpoints are those of ``scripts/vllm_server.sh`` (docs/vllm.md).
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rltrain.errors import RunError
from rltrain.rollout import RolloutLost
from rltrain.rollout.vllm_requests import Request, Sampled
from rltrain.rollout.vllm_weights import WeightFolder
from rltrain.runtime import dist

log = logging.getLogger(__name__)

HEALTH_S = 10.0
POLL_S = 1.0
TOKENS_OF_A_DEADLINE = 4096  # that many new tokens are within rollout.request_s; more have longer, in proportion
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

    def ready(self, weights: Path) -> None:
        """Healthy, and with these weights."""
        self.call("/health", post=False, deadline_s=HEALTH_S)
        if self.call("/weight_info", post=False)["weight_version"] != weights.name:
            self.load(weights)

    def load(self, weights: Path) -> None:
        """Put new weights in place between two batches, and forget what was cached under the old ones."""
        self.call("/pause?mode=wait")
        self.call("/collective_rpc", {"method": "take_weights", "kwargs": {"weights_path": str(weights)}})
        if not self.call("/reset_prefix_cache")["success"]:
            raise ServerDown(f"{self.url}/reset_prefix_cache: blocks are still held")
        self.call("/update_weight_version", {"new_version": weights.name})
        self.call("/resume")

    def completion_s(self, max_tokens: int) -> float:
        """The deadline of a completion of up to ``max_tokens`` tokens."""
        return self._request_s * max(1.0, max_tokens / TOKENS_OF_A_DEADLINE)

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
        self, urls: Sequence[str], folder: Path, *, request_s: float, restart_s: float, max_requests: int, longest: int
    ) -> None:
        self._servers = [Server(url, request_s=request_s) for url in urls]
        self._restart_s, self._max_requests, self._longest = restart_s, max_requests, longest
        self._folder, self._weights = WeightFolder(folder), Path()
        self._checked: set[Server] = set()
        self._down: dict[Server, str] = {}
        self._lock = threading.Lock()  # continuations may be asked for while a thread samples ahead

    def push(self, model: Any) -> None:
        """Write the weights once and have every server read them; one that cannot is named and asked again later."""
        self._weights = self._folder.write(model)
        self._down = dict.fromkeys(self._servers, "has not been asked")
        if dist.is_main():
            self._bring_up()
            self._folder.keep_only(self._weights)
        dist.barrier("weights pushed to the vLLM servers")

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
            server.ready(self._weights)
            if server not in self._checked:
                server.refuse_unfit(longest=self._longest)
                self._checked.add(server)
        except ServerDown as error:
            self._mark(server, error)
        else:
            self._down.pop(server, None)

    def _mark(self, server: Server, error: ServerDown) -> None:
        """Note that a server is down, and why; say so once."""
        if self._down.get(server) != str(error):
            log.warning("vLLM server down: %s", error)
        self._down[server] = str(error)

    def _causes(self) -> str:
        return "; ".join(self._down.values())
