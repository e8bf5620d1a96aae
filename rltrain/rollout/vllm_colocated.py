"""A vLLM engine inside each rank's process, on the rank's own device; asleep while the rank trains, where it can."""

from __future__ import annotations

import contextlib
import importlib
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rltrain.errors import ConfigError
from rltrain.rollout import vllm_worker
from rltrain.rollout.vllm_requests import Request, Sampled
from rltrain.rollout.vllm_weights import checkpoint_weights, describe
from rltrain.runtime import dist

# Read by vLLM when it is imported: the engine in this very process, and threads as the trainer has them.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR"}


class ColocatedEngine:
    """The engine of ``rollout.mode=colocated``; ``arguments`` go to ``vllm.LLM`` as they are, over our own."""

    def __init__(
        self, policy: Any, folder: Path, *, longest: int, cache_gib: float, sleep: bool, arguments: dict[str, Any]
    ) -> None:
        os.environ.update(QUIET | os.environ | ENVIRONMENT)
        vllm = _vllm()
        if dist.is_main():
            describe(policy, folder)
        dist.barrier("model description for vLLM")
        self._sleeps = sleep and importlib.import_module("vllm.platforms").current_platform.is_sleep_mode_available()
        own = {
            "model": str(folder),
            "load_format": "dummy",  # the weights come with the first push
            "dtype": str(policy.model.dtype).removeprefix("torch."),
            "max_model_len": longest,
            "kv_cache_memory_bytes": int(cache_gib * 2**30),
            "logprobs_mode": "processed_logprobs",
            "enable_sleep_mode": self._sleeps,
            "worker_extension_cls": vllm_worker.NAME,
            "enforce_eager": not torch.cuda.is_available(),
            "seed": 0,
        }
        if dist.world_size() > 1:
            own["distributed_executor_backend"] = "external_launcher"
        set_num_threads = torch.set_num_threads
        self._llm = vllm.LLM(**own | arguments)
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker puts a no-op in its place
        _, shutdown, _, _ = self._llm.llm_engine.engine_core._finalizer.detach()
        weakref.finalize(self, _end, shutdown)
        self._vllm = vllm

    def push(self, model: Any) -> None:
        """Put the weights in place, tensor by tensor, and forget what was cached under the old ones."""
        self._wake()
        weights = checkpoint_weights(model)
        self._llm.collective_rpc("take_weights", kwargs={"weights_iterator": weights})
        for _ in weights:  # every rank walks to the end, or the others wait for it
            pass
        self._llm.reset_prefix_cache()

    def sample(self, requests: Sequence[Request], fields: dict[str, Any]) -> list[Sampled]:
        """One answer per request, in order."""
        self._wake()
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
            [self._vllm.SamplingParams(**fields, seed=request.seed) for request in requests],
            use_tqdm=False,
        )
        if self._sleeps:
            self._llm.sleep(level=1)
        return [_sampled(output.outputs[0]) for output in outputs]

    def _wake(self) -> None:
        if self._sleeps:
            self._llm.wake_up()


def _end(shutdown: Callable[[], None]) -> None:
    """At exit the trainer has left the process group, inside which the engine then cannot end groups of its own."""
    with contextlib.suppress(ValueError):
        shutdown()


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(
            f"rollout.mode=colocated: vLLM cannot be imported ({error}); run inside the environment of make vllm-env"
        ) from error
    return vllm


def _sampled(output: Any) -> Sampled:
    ids = tuple(output.token_ids)
    steps = zip(ids, output.logprobs, strict=True)
    return Sampled(token_ids=ids, logprobs=tuple(float(step[token].logprob) for token, step in steps))
