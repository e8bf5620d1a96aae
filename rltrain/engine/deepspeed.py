"""DeepSpeed: build, backward, gradient scale, clip, finite check, step."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rltrain.config import DeepSpeedConfig, OptimizerConfig
from rltrain.engine import zero_shards
from rltrain.errors import RunError
from rltrain.runtime import dist


class NonFiniteError(RunError):
    """A loss or a gradient that is not finite, raised before the optimiser steps."""


def learning_rate(step: int, config: OptimizerConfig, *, total_steps: int) -> float:
    """The rate of step 0, 1, …: linear warm-up, then constant, linear or cosine to zero. A pure function."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    decay = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * decay


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that checks the gradients of all ranks before it steps. Under ZeRO each rank checks its shards."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step, or raise :class:`NonFiniteError` on every rank if a gradient of any rank is not finite."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        worst = dist.all_max(torch.tensor(0.0 if finite else 1.0), name="finite check of the gradients")
        if worst > 0:
            where = "this rank" if not finite else "another rank"
            raise NonFiniteError(f"gradient of rank {dist.rank()}: not finite on {where}; the optimiser did not move")
        super().step(closure)


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> GuardedAdamW:
    """AdamW over the trainable parameters. Vectors (norms, biases) get no weight decay."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [p for p in trainable if len(zero_shards.full_shape(p)) >= 2]
    vectors = [p for p in trainable if len(zero_shards.full_shape(p)) < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (config.betas[0], config.betas[1])
    return GuardedAdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=betas, eps=config.eps)


def deepspeed_dict(config: DeepSpeedConfig, optimizer: OptimizerConfig, *, dtype: str) -> dict[str, Any]:
    """DeepSpeed's own configuration. Accumulation is 1: token weights are global, so nothing is averaged."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm if config.zero_stage or dtype == "bfloat16" else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }
    return _merged(settings, config.extra)


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``extra`` laid over it, dictionaries entry by entry."""
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


class Engine:
    """The policy under DeepSpeed: ``backward`` each micro-batch, then ``step`` once."""

    def __init__(self, module: nn.Module, optimizer: OptimizerConfig, config: DeepSpeedConfig, *, dtype: str) -> None:
        deepspeed = _library()
        self.optimizer_config = optimizer
        self.zero_stage = config.zero_stage
        self.module = module.to(dist.device())
        parts = deepspeed.initialize(
            model=self.module,
            optimizer=build_optimizer(module, optimizer),
            config=deepspeed_dict(config, optimizer, dtype=dtype),
        )
        self.deepspeed: Any = parts[0]
        self.optimizer: Any = parts[1]
        if config.zero_stage == 0 and dtype == "bfloat16":
            self._undo_first_step()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.deepspeed(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of a micro-batch. ``last`` reduces it over ranks."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(undo_averaging(loss))

    def step(self, *, learning_rate: float) -> float:
        """Clip to the global norm, check that it is finite, step. Returns the norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._clip() if self.optimizer is self.deepspeed.basic_optimizer else None
        self.deepspeed.step()
        norm = float(self.deepspeed.get_global_grad_norm() if norm is None else norm)
        if not math.isfinite(norm):  # under ZeRO, DeepSpeed skips the step in silence
            raise NonFiniteError(f"gradient norm of rank {dist.rank()}: {norm}; the optimiser did not move")
        return norm

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Trainable parameters by name, each whole while held (ZeRO 3 shards them). All ranks call this together."""
        import deepspeed

        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero_stage == 3):
                    yield name, parameter.detach()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Under ZeRO 3 every weight is gathered once, for sampling and export. All ranks enter and leave together.

        Inside, ranks may call the model different numbers of times: the hooks that gather layer by layer are off.
        """
        if self.zero_stage < 3:
            yield
            return
        import deepspeed

        offload = self.optimizer.parameter_offload
        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            for hook in [*offload.forward_hooks, *offload.backward_hooks]:
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                parameter: Any
                for parameter in self.module.parameters():
                    parameter.ds_active_sub_modules.clear()
                offload._register_deepspeed_module(offload.module)

    @torch.no_grad()
    def _undo_first_step(self) -> None:
        """Undo the step on zero gradients with which DeepSpeed starts in bf16 without ZeRO, and which AdamW counts."""
        self.deepspeed.basic_optimizer.state.clear()
        for low, high in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True):
            for weight, master in zip(low, high, strict=True):
                master.copy_(weight)

    def held(self) -> list[zero_shards.Shard]:
        """The fp32 weights and the optimiser state that this rank holds, as views."""
        return zero_shards.held(
            self.module.named_parameters(),
            stage=self.zero_stage,
            optimizer=self.optimizer,
            base=self.deepspeed.basic_optimizer,
        )

    def save_state(self, folder: Path) -> Path:
        """Write this rank's shards into ``folder``. Returns the file."""
        return zero_shards.write(folder, self.held(), replicated=self.zero_stage == 0)

    def load_state(self, folder: Path) -> None:
        """Restore what :meth:`save_state` wrote: the same bits, under any stage and number of ranks."""
        held = self.held()
        zero_shards.Archive(folder).restore(held)
        zero_shards.publish(self.module.named_parameters(), held, stage=self.zero_stage, optimizer=self.optimizer)

    def state_bytes(self) -> int:
        """The size of all ranks' files of shards together."""
        trainable = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        return zero_shards.BYTES_PER_ELEMENT * sum(zero_shards.full_shape(p).numel() for p in trainable)

    def _clip(self) -> Tensor:
        """Clip at stage 0 in fp32 and return the norm, which DeepSpeed does not report."""
        trainable = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        norm = nn.utils.clip_grad_norm_(trainable, self.optimizer_config.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise NonFiniteError(f"gradient norm of rank {dist.rank()}: {float(norm)}; the optimiser did not move")
        return norm


def undo_averaging(loss: Tensor) -> Tensor:
    """The loss times the number of ranks: DeepSpeed averages gradients, but token weights sum to 1 over all ranks."""
    return loss * dist.world_size()


def is_sharded(parameter: Any) -> bool:
    """Whether ZeRO 3 holds the parameter."""
    return hasattr(parameter, "ds_id")


def is_whole(module: nn.Module) -> bool:
    """Whether no weight is sharded at this moment: without ZeRO 3, or inside :meth:`Engine.whole_weights`."""
    sharded: list[Any] = [parameter for parameter in module.parameters() if is_sharded(parameter)]
    if not sharded:
        return True
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return all(parameter.ds_status == ZeroParamStatus.AVAILABLE for parameter in sharded)


@contextmanager
def gathered(parameters: Sequence[Any]) -> Iterator[None]:
    """Parameters that ZeRO 3 shards, whole while held, and with rank 0's changes afterwards; others as they are."""
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        yield
        return
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    apart = [parameter for parameter in sharded if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    with deepspeed.zero.GatheredParameters(apart, modifier_rank=0):
        yield


@contextmanager
def sharded_loading(config: DeepSpeedConfig, *, dtype: str) -> Iterator[None]:
    """At ZeRO 3, ``from_pretrained`` inside gives each rank its part of the weights only. Rank 0 reads them."""
    if config.zero_stage < 3:
        yield
        return
    _library()
    from transformers.integrations import deepspeed as integration

    # Bound to a name, because transformers holds a weak reference only.
    active = integration.HfDeepSpeedConfig(deepspeed_dict(config, OptimizerConfig(), dtype=dtype))
    try:
        yield
    finally:
        integration.unset_hf_deepspeed_config()
        del active


def shard_frozen(module: nn.Module, config: DeepSpeedConfig, *, dtype: str) -> Any:
    """A model without an optimiser, called as before. At ZeRO 3 each rank keeps its part of the weights."""
    module = module.to(dist.device())
    if config.zero_stage < 3:
        return module
    settings = deepspeed_dict(config, OptimizerConfig(), dtype=dtype)
    settings["zero_optimization"].pop("offload_optimizer", None)
    return _library().initialize(model=module, config=settings)[0]


def _library() -> Any:
    """DeepSpeed, for the device that is here.

    On CPU it would compile a shared-memory all-reduce (30 s and a C++ compiler) that training never calls.
    """
    os.environ.setdefault("DS_ACCELERATOR", dist.device().type)
    import deepspeed

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
