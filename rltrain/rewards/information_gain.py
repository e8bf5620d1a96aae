"""RLP: what a thought is worth is how much better the model then predicts the text (arXiv 2510.01265)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rltrain.advantages.group import group_advantages


def information_gain(
    thought_logprobs: Sequence[float] | Tensor, baseline_logprob: float | Tensor
) -> tuple[Tensor, Tensor]:
    """``r_i = log p_theta(x | prefix, thought_i) - log p_phi(x | prefix)`` in nats, ``A_i = r_i - mean of the others``.

    ``thought_logprobs`` is [G], ``baseline_logprob`` one number; both results are float64 [G], without gradient. No
    standard deviation: A = G/(G-1)·(r - mean r). The baseline is the same for all thoughts, so it cancels in A and
    shows in r alone. All-equal scores give exact zeros; a NaN score abstains and gets 0; so does G = 1.
    """
    thoughts_G = torch.as_tensor(thought_logprobs, dtype=torch.float64).detach()
    rewards_G = thoughts_G - torch.as_tensor(baseline_logprob, dtype=torch.float64).detach()
    return rewards_G, group_advantages(rewards_G, baseline="leave_one_out", scale="none")
