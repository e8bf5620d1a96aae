"""CurioSFT (2602.02244): a cold start that keeps the entropy of the model it starts from.

Per token y of a solution, with pi_0 the starting model and tau a temperature of its own for each token::

    -log pi(y) + alpha/2 · (log pi(y) - log pi_tau(y))²        pi_tau = softmax(logits of pi_0 / tau), no gradient

tau in [1.1, 1.5] is where the entropy of pi_tau is H + sigmoid(2 (H - 1.2)) / 2, H that of pi_0, both over the 512
largest logits. Where H <= 0.03 it is 1.1.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LOWEST, HIGHEST = 1.1, 1.5
CANDIDATES = 512
_BISECTIONS = 20
_CERTAIN_NATS = 0.03


def temperatures(logits_NV: Tensor) -> Tensor:
    """tau_N of the starting model's logits, by bisection, to 0.4 / 2^20."""
    largest_NK = logits_NV.float().topk(min(CANDIDATES, logits_NV.shape[-1]), dim=-1).values
    entropy_N = _entropies(largest_NK, torch.ones(len(largest_NK), device=largest_NK.device))
    wanted_N = entropy_N + torch.sigmoid(2 * (entropy_N - 1.2)) / 2
    low_N, high_N = torch.full_like(entropy_N, LOWEST), torch.full_like(entropy_N, HIGHEST)
    for _ in range(_BISECTIONS):
        middle_N = (low_N + high_N) / 2
        below_N = _entropies(largest_NK, middle_N) < wanted_N
        low_N, high_N = torch.where(below_N, middle_N, low_N), torch.where(below_N, high_N, middle_N)
    return torch.where(entropy_N <= _CERTAIN_NATS, LOWEST, (low_N + high_N) / 2)


def _entropies(logits_NK: Tensor, temperature_N: Tensor) -> Tensor:
    logprobs_NK = (logits_NK / temperature_N[:, None]).log_softmax(-1)
    return -(logprobs_NK.exp() * logprobs_NK).sum(-1)


def token_losses(logits_NV: Tensor, start_logits_NV: Tensor, targets_N: Tensor, *, alpha: float) -> Tensor:
    """The objective of each token, in fp32; its gradient flows into ``logits_NV`` alone."""
    logprobs_N = _chosen(logits_NV.float(), targets_N)
    with torch.no_grad():
        tempered_NV = start_logits_NV.float() / temperatures(start_logits_NV)[:, None]
        wanted_N = _chosen(tempered_NV, targets_N)
    return -logprobs_N + alpha / 2 * (logprobs_N - wanted_N).square()


def _chosen(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return logits_NV.log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1)


def trainer_class(base: type, model: Any, *, alpha: float) -> type:
    """``base``, TRL's SFTTrainer, with this objective. It keeps a copy of the model, or turns its adapters off."""
    start = None if hasattr(model, "disable_adapter") else copy.deepcopy(model).eval().requires_grad_(False)

    class CurioTrainer(base):
        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """The mean over the tokens of all gradient accumulation steps."""
            labels_N, places_BT = _labelled(inputs["labels"])
            fed = {key: inputs[key] for key in ("input_ids", "attention_mask") if key in inputs}
            logits_NV = model(**fed).logits[:, :-1][places_BT]
            with torch.no_grad(), _starting(self.accelerator.unwrap_model(model), start) as frozen:
                start_logits_NV = frozen.to(labels_N.device)(**fed).logits[:, :-1][places_BT]
            losses_N = token_losses(logits_NV, start_logits_NV, labels_N, alpha=alpha)
            tokens = len(labels_N) if num_items_in_batch is None else num_items_in_batch
            return losses_N.sum() / torch.as_tensor(tokens).clamp(min=1)

    return CurioTrainer


def _labelled(labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The labels that count, and where the logits that predict them are."""
    following_BT = labels_BT[:, 1:]
    places_BT = following_BT >= 0
    return following_BT[places_BT], places_BT


@contextlib.contextmanager
def _starting(model: Any, start: Any) -> Iterator[Any]:
    """The starting model, without dropout."""
    if start is not None:
        yield start
        return
    was_training = model.training
    with model.disable_adapter():
        model.eval()
        try:
            yield model
        finally:
            model.train(was_training)
