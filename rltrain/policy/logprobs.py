"""The policy's log-probs of a packed micro-batch. Only hidden states that predict a loss token reach the head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rltrain.config import LossConfig
from rltrain.kernels import TokenLoss, fused_token_loss, prefers_fused, token_logprobs
from rltrain.kernels.reference import head_logits, logits_logprobs
from rltrain.loss import loss_output, policy_loss, token_losses
from rltrain.losses.introspection import Introspected, introspection_loss
from rltrain.policy import packed_attention
from rltrain.policy.capabilities import cannot_pack
from rltrain.policy.head import head_options, is_plain, own_logits
from rltrain.policy.packed_attention import gather
from rltrain.policy.reserved_rows import reserved_rows
from rltrain.runtime.introspection import IntrospectionConfig
from rltrain.types import LossOutput, Sum, TokenBatch

MOST_LOGITS = 2**22
"""Logits (16 MB in fp32) that are held at once where a function reads them whole."""


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


@dataclass(frozen=True, kw_only=True)
class HeadOutput:
    """What the head gives of a micro-batch: fp32 log-probs of its loss tokens, and what else was asked for.

    ``collision_N`` is Σ p², without gradient. ``loss`` is set where the head was given the loss; it alone
    is then differentiable, beside ``introspected``.
    """

    logprobs_N: Tensor
    entropy_N: Tensor | None
    loss: Tensor | None = None
    collision_N: Tensor | None = None
    introspected: Introspected | None = None


@dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """How the completions of an optimiser batch, which has ``tokens`` loss tokens, train the introspection head."""

    config: IntrospectionConfig
    tokens: float

    @property
    def gradient(self) -> Literal["rows", "trunk"]:
        """Where the head's gradient ends."""
        return "trunk" if self.config.trunk else "rows"

    def added_to(self, output: LossOutput, introspected: Introspected | None, batch: TokenBatch) -> LossOutput:
        """The policy loss with the head's, or that alone."""
        assert introspected is not None
        loss, metrics = introspection_loss(introspected, batch, self.config, tokens=self.tokens)
        whole = loss if self.config.alone else output.loss + loss
        metrics = {**output.metrics, **metrics, "loss": Sum(value=float(whole.detach()))}
        return dataclasses.replace(output, loss=whole, metrics=metrics)


class LogprobModel(nn.Module):
    """Wraps a causal language model so that ``forward(batch)`` gives fp32 log-probs and entropies of its loss tokens.

    Log-probs are those of softmax(logits / temperature), the distribution that the sampler drew from, unless a call
    asks for another temperature. Callers go through :func:`logprobs` or :func:`micro_batch_loss`.
    """

    def __init__(self, model: Any, *, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.own_head = not is_plain(model.get_output_embeddings())  # and where the check before the first step says so
        self.cannot_pack = cannot_pack(model)
        if self.cannot_pack is None:
            packed_attention.enable(model)

    @property
    def vocabulary(self) -> int:
        """Rows of the head, also where ZeRO 3 has sharded it."""
        return self.model.get_output_embeddings().out_features

    def forward(
        self,
        batch: TokenBatch,
        *,
        entropy: bool = True,
        collision: bool = False,
        temperature: float | None = None,
        token_loss: TokenLoss | None = None,
        of_logits: Callable[[Tensor], Tensor] | None = None,
        grid: Literal["rows", "trunk"] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Introspected | None]:
        """The fields of :class:`HeadOutput`, as a tuple because DeepSpeed's hooks look into no record.

        With ``of_logits`` the first is what it gives of the logits [n, V], which are made for some rows at a time.
        ``grid`` asks for the introspection head, and says where its gradient ends.
        """
        if of_logits is not None:
            return self._of_logits(batch, of_logits), None, None, None, None
        temperature = temperature or self.temperature
        if self.own_head:
            logprobs_N, entropy_N, collision_N = logits_logprobs(
                self._own_logits(batch),
                batch.targets_N,
                temperature=temperature,
                entropy=entropy,
                collision=collision,
            )
            return logprobs_N, entropy_N, None, collision_N, None
        hidden_ND = loss_states(self.model, batch)
        introspected = None if grid is None else self._introspected(hidden_ND, batch, grid)
        arguments = (hidden_ND, self.model.get_output_embeddings().weight, batch.targets_N)
        options = head_options(self.model, temperature, entropy=entropy)
        if token_loss is not None:
            fused = fused_token_loss(*arguments, token_loss, **options)
            return fused.logprobs_N, fused.entropy_N, fused.loss, None, introspected
        if not collision:
            return (*token_logprobs(*arguments, **options), None, None, introspected)
        logprobs_N, entropy_N, collision_N = token_logprobs(*arguments, **options, collision=True)
        return logprobs_N, entropy_N, None, collision_N, introspected

    def _introspected(self, hidden_ND: Tensor, batch: TokenBatch, grid: Literal["rows", "trunk"]) -> Introspected:
        """The reserved rows' logits at temperature 1, and the log-probs of ``batch.top_NK``."""
        rows = reserved_rows(self.model)
        assert rows is not None, "the model has no introspection head"
        weight_CD = self.model.get_output_embeddings().weight[rows]
        grid_NC = head_logits(hidden_ND.detach() if grid == "rows" else hidden_ND, weight_CD)
        if batch.top_NK is None:
            return Introspected(grid_NC, None)
        size = max(1, MOST_LOGITS // self.vocabulary)
        pieces = zip(hidden_ND.split(size), batch.top_NK.split(size), strict=True)
        top = [checkpoint(self._logprobs_of, *piece, use_reentrant=False) for piece in pieces]
        return Introspected(grid_NC, torch.cat(top))

    def _logprobs_of(self, hidden_nD: Tensor, ids_nK: Tensor) -> Tensor:
        """Log-probs of some ids at temperature 1. The logits of all ids are made anew in the backward pass."""
        return self._logits(hidden_nD).log_softmax(-1).gather(-1, ids_nK)

    def _logits(self, hidden_nD: Tensor) -> Tensor:
        """The logits [n, V] of a plain head, at temperature 1."""
        options = head_options(self.model, 1.0, entropy=False)
        weight_VD = self.model.get_output_embeddings().weight
        logits_nV = head_logits(hidden_nD, weight_VD, bias_V=options["bias_V"], softcap=options["softcap"])
        return logits_nV / options["temperature"]

    def _of_logits(self, batch: TokenBatch, function: Callable[[Tensor], Tensor]) -> Tensor:
        rows = max(1, MOST_LOGITS // self.vocabulary)
        if self.own_head:
            return torch.cat([function(logits_nV) for logits_nV in self._own_logits(batch).split(rows)])
        return torch.cat(
            [function(self._logits(hidden_nD)) for hidden_nD in loss_states(self.model, batch).split(rows)]
        )

    def _own_logits(self, batch: TokenBatch) -> Tensor:
        return own_logits(self.model, *decoder_inputs(self.model, batch))


def unwrapped(model: Any) -> LogprobModel:
    """The :class:`LogprobModel` in an engine of DeepSpeed, or itself."""
    return model if isinstance(model, LogprobModel) else model.module


def of_logits(model: Any, batch: TokenBatch, function: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``function`` gives of the logits [n, V] at temperature 1, for all loss tokens of a micro-batch."""
    return model(batch, of_logits=function)[0]


def logprobs(
    model: Any, batch: TokenBatch, *, entropy: bool = True, collision: bool = False, temperature: float | None = None
) -> HeadOutput:
    """Log-probs and what else is asked of a micro-batch under a :class:`LogprobModel` or the engine that holds it."""
    options = {"entropy": entropy, "collision": collision, "temperature": temperature}
    logprobs_N, entropy_N, _, collision_N, _ = model(batch, **options)
    return HeadOutput(logprobs_N=logprobs_N, entropy_N=entropy_N, collision_N=collision_N)


def introspect(model: Any, batch: TokenBatch) -> Tensor:
    """Logits of the introspection head's grid at the states that predict the loss tokens, [N, C]."""
    introspected = model(batch, entropy=False, grid="rows")[-1]
    return introspected.grid_NC


def micro_batch_loss(
    model: Any, batch: TokenBatch, config: LossConfig, training: HeadTraining | None = None
) -> LossOutput:
    """The policy loss of a micro-batch under a :class:`LogprobModel` or the engine that holds it.

    Where the fused head is the faster path, and the loss is separable, the head differentiates the loss itself.
    ``training`` adds the introspection head's loss, from the same states.
    """
    module, device = unwrapped(model), batch.targets_N.device
    fits = config.separable and not module.own_head and not (training and training.config.alone)
    grid = training.gradient if training else None
    if fits and prefers_fused(len(batch.targets_N), module.vocabulary, device):
        output, introspected = _fused_loss(model, batch, config, grid)
    else:
        logprobs_N, entropy_N, _, _, introspected = model(batch, grid=grid)
        output = policy_loss(logprobs_N, batch, config, entropy_N=entropy_N)
    return training.added_to(output, introspected, batch) if training else output


def fused_micro_batch_loss(model: Any, batch: TokenBatch, config: LossConfig) -> LossOutput:
    """The same with the gradient made in the head's forward (:func:`rltrain.kernels.fused_token_loss`)."""

    return _fused_loss(model, batch, config, None)[0]


def _fused_loss(
    model: Any, batch: TokenBatch, config: LossConfig, grid: Literal["rows", "trunk"] | None
) -> tuple[LossOutput, Introspected | None]:
    def token_loss(logprobs_n: Tensor, entropy_n: Tensor | None, rows: slice) -> Tensor:
        return token_losses(logprobs_n, loss_tokens(batch, rows), config, entropy_N=entropy_n)

    logprobs_N, entropy_N, loss, _, introspected = model(batch, token_loss=token_loss, grid=grid)
    return loss_output(loss, logprobs_N, batch, config, entropy_N=entropy_N), introspected


def loss_tokens(batch: TokenBatch, rows: slice | Tensor) -> TokenBatch:
    """The same sequences with some of their loss tokens."""
    per_token = {name: value[rows] for name, value in vars(batch).items() if name.endswith("_N") and value is not None}
    return dataclasses.replace(batch, **per_token)


def decoder_inputs(model: Any, batch: TokenBatch) -> tuple[dict[str, Any], Tensor]:
    """What the decoder is fed, and where in its flat rows the states are that predict the loss tokens."""
    return padded_inputs(batch) if batch.prefix_S is None else packed_inputs(model, batch)


def loss_states(model: Any, batch: TokenBatch) -> Tensor:
    """The last hidden states that predict the loss tokens, [N, D]."""
    inputs, place_N = decoder_inputs(model, batch)
    hidden_BTD = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    return gather(hidden_BTD.flatten(0, 1), place_N)


def padded_inputs(batch: TokenBatch) -> tuple[dict[str, Any], Tensor]:
    """Sequences become right-padded rows.

    Under a causal mask nothing attends to padding on its right, so no mask is needed and the result is that of each
    sequence alone.
    """
    lengths_S = batch.boundaries_S1.diff()
    longest = int(lengths_S.max())
    column_BT = torch.arange(longest, device=lengths_S.device).expand(len(lengths_S), longest)
    real_BT = column_BT < lengths_S[:, None]
    input_ids_BT = torch.zeros_like(column_BT).masked_scatter(real_BT, batch.input_ids_L)
    place_L = real_BT.flatten().nonzero().squeeze(1)
    return {"input_ids": input_ids_BT}, place_L[batch.source_N]


def packed_inputs(model: Any, batch: TokenBatch) -> tuple[dict[str, Any], Tensor]:
    """Sequences stay end to end in one row without padding; attention respects their boundaries and prefixes."""
    ids_1L, positions_1L = batch.input_ids_L[None], batch.positions_L[None]
    how = packed_attention.arguments(model, batch)
    return {"input_ids": ids_1L, "position_ids": positions_1L, **how}, batch.source_N
