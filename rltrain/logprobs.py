"""The policy's log-probs of a packed micro-batch. Only hidden states that predict a loss token reach the head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rltrain.kernels import token_logprobs
from rltrain.types import TokenBatch


def to_device(batch: TokenBatch, device: torch.device) -> TokenBatch:
    """The same micro-batch on ``device``."""
    moved = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return TokenBatch(**(vars(batch) | moved))


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's training flag is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class LogprobModel(nn.Module):
    """Wraps a causal language model so that ``forward(batch)`` gives fp32 log-probs and entropies of its loss tokens.

    Log-probs are those of softmax(logits / temperature), the distribution that the sampler drew from, unless a call
    asks for another temperature.
    """

    def __init__(self, model: Any, *, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(
        self, batch: TokenBatch, *, entropy: bool = True, temperature: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``(logprobs_N, entropy_N)`` of ``batch.targets_N``; differentiable."""
        hidden_ND = hidden_states(self.model, batch)[batch.source_N]
        head = self.model.get_output_embeddings()
        config = self.model.config.get_text_config()
        return token_logprobs(
            hidden_ND,
            head.weight,
            batch.targets_N,
            temperature=(temperature or self.temperature) / logit_scale(config),
            entropy=entropy,
            bias_V=getattr(head, "bias", None),
            softcap=getattr(config, "final_logit_softcapping", None),
        )


def logit_scale(config: Any) -> float:
    """What an architecture multiplies its logits by (Cohere) or, inverted, divides them by (Granite)."""
    return float(getattr(config, "logit_scale", 1.0)) / float(getattr(config, "logits_scaling", 1.0))


def hidden_states(model: Any, batch: TokenBatch) -> Tensor:
    """The last hidden state of every packed token, [L, D].

    Sequences become right-padded rows: under a causal mask nothing attends to padding on its right, so no mask is
    needed and the result is that of each sequence alone.
    """
    lengths_S = batch.boundaries_S1.diff()
    longest = int(lengths_S.max())
    column_BT = torch.arange(longest, device=lengths_S.device).expand(len(lengths_S), longest)
    real_BT = column_BT < lengths_S[:, None]
    input_ids_BT = torch.zeros_like(column_BT).masked_scatter(real_BT, batch.input_ids_L)
    hidden_BTD = model.get_decoder()(input_ids=input_ids_BT, use_cache=False).last_hidden_state
    return hidden_BTD[real_BT]
