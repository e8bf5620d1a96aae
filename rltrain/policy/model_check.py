"""Log-probs against an independent forward of the model, before the first step.

Two short prompts with two completions each go through ``model(input_ids).logits`` row by row: no padding, no cache,
no mask. A path is measured by the mean of |log p - log p'| (nats) over the tokens of the completions, with LoRA
adapters as they are and perturbed, since new adapters change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rltrain.batching.collate import LossRow, Unit
from rltrain.engine.deepspeed import gathered
from rltrain.errors import ConfigError, RunError
from rltrain.policy.logprobs import inference
from rltrain.policy.reserved_rows import reserved_rows
from rltrain.runtime import dist

PROMPT_TOKENS = (5, 11)  # unequal, so that padding takes part
COMPLETION_TOKENS = (3, 6)
MOST_IDS = 4096

LEAST_SPREAD, MOST_SPREAD = 0.03, 1.0
"""Nats. A model of almost equal logits is held to more digits; below the least, the rounding of log p itself counts."""

PERTURBATION = 0.05
"""Standard deviation of what is added to every adapter weight: enough to move the logits by more than rounding."""


FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError)
"""What an architecture raises when it is called in a way that it does not know."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of a path from the model's own forward: nats, what they may be, and the error if there is no result."""

    nats: float
    limit: float
    error: str = ""

    @property
    def fits(self) -> bool:
        return self.nats <= self.limit

    def __str__(self) -> str:
        return f"{self.nats:.2g} nats from those of its own forward, more than {self.limit:.2g}{self.error}"


def check_units(model: Any) -> list[Unit]:
    """The prompts and completions, of ids that have no part of their own in the model (padding, images, a grid)."""
    config = model.config.get_text_config()
    named = [value for each in (config, model.config) for name, value in vars(each).items() if "token_i" in name]
    special = [token for value in named for token in (value if isinstance(value, (list, tuple)) else [value])]
    rows = reserved_rows(model)
    special += range(rows.start, rows.stop) if rows is not None else ()
    ids = [index for index in range(min(config.vocab_size, MOST_IDS)) if index not in special]

    def row(prompt_seed: int, seed: int, prompt: int, completion: int) -> LossRow:
        return LossRow(
            prompt_ids=tuple(ids[(37 * (prompt_seed + i) + 11) % len(ids)] for i in range(prompt)),
            completion_ids=tuple(ids[(37 * (seed + i) + 11) % len(ids)] for i in range(completion)),
            sampler_logprobs=(0.0,) * completion,
            advantages_T=torch.zeros(completion),
        )

    return [
        tuple(row(first, first + 100 * (g + 1), prompt, length) for g, length in enumerate(COMPLETION_TOKENS))
        for first, prompt in zip((0, 50), PROMPT_TOKENS, strict=True)
    ]


def own_logprobs(model: Any, units: Sequence[Unit]) -> Tensor:
    """[N] of all completions in order, at temperature 1, each row by itself through transformers' model.

    ConfigError where that fails, is not finite, or where a token's logits depend on later tokens.
    """
    name = type(model).__name__
    try:
        logprobs = [[_row_logprobs(model, row) for row in unit] for unit in units]
    except (RunError, torch.OutOfMemoryError):  # a lost rank, a full card: not the model's
        raise
    except FAILURES as error:
        raise ConfigError(
            f"model: {name} fails on {PROMPT_TOKENS[0] + COMPLETION_TOKENS[0]} token ids ({_line(error)}); choose a "
            "causal language model of text"
        ) from error
    own_N = torch.cat([prompt_and_own[1] for unit in logprobs for prompt_and_own in unit])
    if not bool(torch.isfinite(own_N).all()):
        raise ConfigError(
            f"model: the logits of {name} are not finite on a short prompt; look at its weights and dtype"
        )
    apart = max(float((unit[0][0] - unit[1][0]).abs().mean()) for unit in logprobs)
    if apart > limit(model, own_N):
        raise ConfigError(
            f"model: in {name} the log-probs of a prompt's tokens are {apart:.2g} nats apart before two completions: "
            "tokens see later ones; choose a causal language model"
        )
    return own_N


def _row_logprobs(model: Any, row: LossRow) -> tuple[Tensor, Tensor]:
    """Of the prompt's tokens but the first, and of the completion's."""
    ids_T = torch.tensor(row.prompt_ids + row.completion_ids, device=model.device)
    logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1]
    wide_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    logprobs_T = wide_TV.log_softmax(-1).gather(-1, ids_T[1:, None]).squeeze(-1)
    prompt = len(row.prompt_ids) - 1
    return logprobs_T[:prompt], logprobs_T[prompt:]


def limit(model: Any, own_N: Tensor) -> float:
    """Nats: half the digits of the model's precision (2e-4 in fp32, 0.09 in bf16 where log-probs differ by a nat).

    Rounding grows with the logits, so the limit is relative to their spread, up to one nat.
    """
    spread = min(max(float(own_N.std()), LEAST_SPREAD), MOST_SPREAD)
    return torch.finfo(model.dtype).eps ** 0.5 * spread


def difference(compute: Callable[[], Tensor], own_N: Tensor, limit: float) -> Difference:
    """Of what ``compute`` gives, the worst over ranks; infinite where it fails."""
    error = ""
    try:
        nats = (compute().to(own_N) - own_N).abs().mean().nan_to_num(torch.inf)
    except (RunError, torch.OutOfMemoryError):
        raise
    except FAILURES as failure:
        nats, error = torch.tensor(torch.inf), f" ({_line(failure)})"
    nats = float(dist.all_max(nats.float().cpu(), name="check of the model"))
    limit = float(dist.all_max(torch.tensor(limit, dtype=torch.float64), name="limit of the check"))
    return Difference(nats=nats, limit=limit, error=error)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


@contextmanager
def quiet(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients, and torch's generators as they were before."""
    devices = [dist.device()] if dist.device().type == "cuda" else []
    with torch.random.fork_rng(devices=devices), inference(model):
        yield


def states(model: Any) -> Iterator[Any]:
    """Contexts: the model as it is and, where it has LoRA adapters, with these perturbed."""
    yield nullcontext()
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    if adapters:
        yield perturbed(adapters)


@contextmanager
def perturbed(adapters: Sequence[Tensor]) -> Iterator[None]:
    """Adapter weights with noise, the same on every rank; afterwards they are what they were, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        with gathered(adapters):
            kept = [weight.detach().clone() for weight in adapters]
            for weight in adapters:
                weight.add_((PERTURBATION * torch.randn(weight.shape, generator=generator)).to(weight))
        try:
            yield
        finally:
            with gathered(adapters):
                for weight, before in zip(adapters, kept, strict=True):
                    weight.copy_(before)
