"""What rltrain adds to a worker of vLLM, in a server or in the trainer's process: taking over new weights whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

NAME = f"{__name__}.WeightReceiver"  # for --worker-extension-cls


class WeightReceiver:
    """Mixed into vLLM's worker class, whose attributes it uses; imports nothing that a server does not have."""

    vllm_config: Any
    model_runner: Any
    reload_weights: Any

    def take_weights(
        self, weights_path: str | None = None, weights_iterator: Iterator[tuple[str, Tensor]] | None = None
    ) -> None:
        """Load a folder of safetensors, or ``(name, tensor)`` pairs named as in one, in place of the present weights.

        On a CPU vLLM multiplies by a repacked copy of each matrix. Its own reload forgets the copy of an output head
        that is tied to the embeddings (seen in 0.32), so heads are packed once more here.
        """
        load = self.vllm_config.load_config
        load.load_format = "auto"  # a server may have started from dummy weights
        if weights_path and not load.model_loader_extra_config and load.safetensors_load_strategy in (None, "lazy"):
            load.model_loader_extra_config = {"enable_multithread_load": True}  # several files at once
        self.reload_weights(weights_path=weights_path, weights_iterator=weights_iterator, is_checkpoint_format=True)
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead  # pyright: ignore[reportMissingImports]
        from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

        if current_platform.is_cpu():
            for module in self.model_runner.get_model().modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)
