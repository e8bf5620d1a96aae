"""A decoding step as a CUDA graph: its hundreds of launches become one (PyTorch's notes on CUDA graphs).

A graph replays kernels on fixed addresses. So what changes between steps (tokens, positions, the column to write) lies
in tensors that are changed in place, and nothing in a step may be read by the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]

WARM_STEPS = 2
"""Steps without a graph after every change of addresses: a capture costs about as many, and a stay may be short."""


class StepGraph:
    """``run`` of tokens [B] to logits, captured at once and replayed with other tokens.

    ``run`` is called twice, so running it again with the same tokens must change nothing. The logits are good until the
    next call. Graphs of one ``pool`` share memory, and only the newest may be used.
    """

    def __init__(self, run: Step, tokens_B: Tensor, pool: Any) -> None:
        self._tokens_B = tokens_B.clone()
        # Libraries set themselves up in a first run on a stream of its own, which a capture must not contain.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(self._tokens_B)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Only this thread may not do what a capture forbids: NCCL's watchdog queries events all the time.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._logits_BV = run(self._tokens_B)

    def __call__(self, tokens_B: Tensor) -> Tensor:
        self._tokens_B.copy_(tokens_B)
        self._graph.replay()
        return self._logits_BV


class StepRunner:
    """Runs a step itself or, once its addresses have stayed the same for a while, a graph of it.

    ``changed`` must be called whenever a tensor that the step reads or writes was replaced.
    """

    def __init__(self, *, graphs: bool) -> None:
        self._graphs, self._since = graphs, 0
        self._graph: StepGraph | None = None
        self._pool: Any = None

    def changed(self) -> None:
        """Forget the graph: it would read and write what is gone."""
        self._graph, self._since = None, 0

    def __call__(self, run: Step, tokens_B: Tensor) -> Tensor:
        """``run(tokens_B)``, always of the same step."""
        if not self._graphs:
            return run(tokens_B)
        if self._graph is None and self._since >= WARM_STEPS:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graph = StepGraph(run, tokens_B, self._pool)
        self._since += 1
        return run(tokens_B) if self._graph is None else self._graph(tokens_B)
