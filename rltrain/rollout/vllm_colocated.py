"""A vLLM engine inside each rank's process, on the rank's own device; asleep while the rank trains, where it can."""

from __future__ import annotations

import contextlib
import importlib
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rltrain.engine import zero_shards
from rltrain.errors import ConfigError, require
from rltrain.rollout import vllm_worker
from rltrain.rollout.vllm_requests import Request, Sampled
from rltrain.rollout.vllm_weights import checkpoint_weights, describe
from rltrain.runtime import dist

# Read by vLLM when it is imported: the engine in this very process, and threads as the trainer has them.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
GIB = 2**30
CACHE_GIB = 2.0  # where nothing says how much there is
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR"}


class ColocatedEngine:
    """The engine of ``rollout.mode=colocated``; ``arguments`` go to ``vllm.LLM`` as they are, over our own."""

    def __init__(
        self,
        policy: Any,
        folder: Path,
        *,
        longest: int,
        cache_gib: float,
        sleep: bool,
        arguments: dict[str, Any],
        zero_stage: int = 0,
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
            "logprobs_mode": "processed_logprobs",
            "enable_sleep_mode": self._sleeps,
            "worker_extension_cls": vllm_worker.NAME,
            "enforce_eager": not torch.cuda.is_available(),
            "seed": 0,
        } | _memory(policy, cache_gib, sleeps=self._sleeps, zero_stage=zero_stage)
        if dist.world_size() > 1:
            own["distributed_executor_backend"] = "external_launcher"
        set_num_threads = torch.set_num_threads
        self._llm = vllm.LLM(**own | arguments)
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker puts a no-op in its place
        _, shutdown, _, _ = self._llm.llm_engine.engine_core._finalizer.detach()
        weakref.finalize(self, _end, shutdown)
        self._vllm = vllm
        self._asleep, self._pushed, self._stays = False, None, False

    def push(self, model: Any) -> None:
        """Put the weights in place, tensor by tensor, and forget what was cached under the old ones.

        The cache wakes after the weights are whole, so that both never meet the buffers of the push.
        """
        if self._asleep and torch.cuda.is_available():
            torch.cuda.empty_cache()  # blocks that the trainer freed and its allocator keeps
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        weights = checkpoint_weights(model)
        self._llm.collective_rpc("take_weights", kwargs={"weights_iterator": weights})
        for _ in weights:  # every rank walks to the end, or the others wait for it
            pass
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
        self._asleep, self._pushed = False, model
        self._llm.reset_prefix_cache()

    def sample(self, requests: Sequence[Request], fields: dict[str, Any]) -> list[Sampled]:
        """One answer per request, in order. Sleep drops the weights, which are pushed again if no push came since.

        A rank without requests sleeps, too: all ranks push together, since ZeRO 3 gathers the weights.
        """
        if self._asleep:
            self.push(self._pushed)
        outputs = self._generate(requests, fields) if requests else []
        self._rest()
        return [_sampled(output.outputs[0]) for output in outputs]

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Sleep after the last of several calls alone, which all ranks make together."""
        self._stays = True
        try:
            yield
        finally:
            self._stays = False
            self._rest()

    def _rest(self) -> None:
        if self._sleeps and not self._stays and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True

    def _generate(self, requests: Sequence[Request], fields: dict[str, Any]) -> list[Any]:
        return self._llm.generate(
            [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
            [self._vllm.SamplingParams(**{**fields, **request.fields}, seed=request.seed) for request in requests],
            use_tqdm=False,
        )


def _memory(policy: Any, cache_gib: float, *, sleeps: bool, zero_stage: int) -> dict[str, Any]:
    """What vLLM is told about memory on the device that it shares with the trainer."""
    if not torch.cuda.is_available():
        return {"kv_cache_memory_bytes": int((cache_gib or CACHE_GIB) * GIB)}
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    trained = trained_share(policy.model, zero_stage)
    return memory_arguments(free, total, trained=trained, cache_gib=cache_gib, sleeps=sleeps)


def trained_share(model: Any, zero_stage: int) -> int:
    """Of how many trained parameters this rank holds moments and gradients: above stage 0 of its shard."""
    trained = sum(zero_shards.full_shape(one).numel() for one in model.parameters() if one.requires_grad)
    return -(-trained // dist.world_size()) if zero_stage else trained


def memory_arguments(free: int, total: int, *, trained: int, cache_gib: float, sleeps: bool) -> dict[str, Any]:
    """``vllm.LLM``'s arguments on a GPU with ``free`` of ``total`` bytes and ``trained`` parameters of its rank.

    vLLM refuses to start unless ``gpu_memory_utilization`` of the card is free. Of that share it fills with cache what
    weights and activations leave. Kept back: 12 bytes a trained parameter, for fp32 gradients and moments that come
    with the first step, and a tenth of the card. An engine that never sleeps keeps its cache while the rank trains, so
    its cache is small unless ``cache_gib`` says otherwise.
    """
    share = (free - 12 * trained) / total - 0.1
    require(
        share > 0,
        f"rollout.mode=colocated: {free / GIB:.1f} of {total / GIB:.1f} GiB are free, which gradients, moments and a "
        "reserve of a tenth fill up; shard with deepspeed.zero_stage=3, or set rollout.mode=server",
    )
    arguments: dict[str, Any] = {"gpu_memory_utilization": round(share, 4)}
    if cache_gib or not sleeps:
        arguments["kv_cache_memory_bytes"] = int((cache_gib or CACHE_GIB) * GIB)
    return arguments


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
