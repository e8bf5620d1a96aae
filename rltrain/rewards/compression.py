"""ConMax: a trace may be short as long as a frozen model stays sure of it and of the answer (arXiv 2601.04973)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOOR_MARGIN = 1.0
FLOOR_ALONE = -10.0


def compression_reward(
    answer_logprobs: Sequence[Any] | Tensor, trace_logprobs: Sequence[Any] | Tensor, *, beta: float = 1.2
) -> Tensor:
    """``R_i = S_ans + beta·S_think``, float64 [G], in nats per token.

    S_ans is the mean of completion i's answer log-probs, S_think that of its compressed trace's; means of log-probs,
    not exponentiated, and no length term. Each argument holds one sequence of log-probs (or their mean) per completion.

    An empty sequence marks an output without a usable trace. It gets the floor: the lowest valid reward of the group
    minus 1, or -10 if none is valid.
    """
    answers_G, traces_G = _means(answer_logprobs), _means(trace_logprobs)
    return floored(answers_G + beta * traces_G)


def floored(rewards_G: Tensor) -> Tensor:
    """NaN rewards replaced by the floor: the lowest other reward minus 1, or -10 if there is none."""
    valid = rewards_G[~rewards_G.isnan()]
    floor = float(valid.min()) - FLOOR_MARGIN if len(valid) else FLOOR_ALONE
    return rewards_G.nan_to_num(nan=floor)


def _means(logprobs: Sequence[Any] | Tensor) -> Tensor:
    """Mean of each sequence, NaN of an empty one."""
    means = [torch.as_tensor(one, dtype=torch.float64).detach().mean() for one in logprobs]
    return torch.stack(means) if means else torch.zeros(0, dtype=torch.float64)
