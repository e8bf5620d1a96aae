"""SPO-chain: credit of segments that are cut at uncertain tokens, by continuations (arXiv 2505.23564)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.continued_values import (
    ContinuedValuesConfig,
    estimate,
    finished,
    segment_tokens,
    segment_values,
    spread,
)
from rltrain.advantages.group import as_rewards
from rltrain.advantages.written import written_mask
from rltrain.errors import require
from rltrain.registry import register
from rltrain.types import Advantages, Completion, Context, Group, Need


@dataclass(kw_only=True)
class SPOConfig(ContinuedValuesConfig):
    """See :func:`spo_advantages` and :func:`segment_borders`.

    A token of a probability below ``threshold`` is uncertain, and every ``interval``-th of them begins a segment.
    At most ``max_states`` cuts of a completion are asked, evenly spaced, the last one kept.
    The value of the prompt is that of continuations, or with ``start=others`` the other completions' mean reward.
    """

    max_states: int = 64
    start: str = "continuations"
    threshold: float = 0.9
    interval: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 < self.threshold <= 1, f"advantage.threshold={self.threshold}: must lie in (0, 1]; 0.9 is the paper's"
        )
        require(self.interval >= 1, f"advantage.interval={self.interval}: set at least 1; 5 is the paper's")


def spo_advantages(
    rewards: Sequence[Sequence[float | None] | Tensor],
    values: Sequence[Sequence[Sequence[float] | Tensor]],
    tokens: Sequence[Sequence[Sequence[int] | Tensor]],
    probabilities: Sequence[Sequence[Sequence[float] | Tensor]],
    *,
    threshold: float = 0.9,
    whiten: bool = True,
) -> list[list[Tensor]]:
    r"""One float64 tensor [T] per completion. The arguments are nested groups x completions (x segments or tokens).

        A = V(end) - V(start) of the token's segment, V(end) = r for the last;   A = 0 where p_t >= threshold
        result = (A - mean_B(A)) / (std_B(A) + 1e-8)            population std (ddof 0), if ``whiten``

    ``values`` are those before each segment, NaN where not estimated, as for
    :func:`~rltrain.advantages.vineppo.vineppo_advantages`; ``tokens`` is the number of each segment's. One A per
    segment sums to ``r - V_0``. mean_B and std_B run over the tokens below the threshold of all ranks, which call this
    together; all others get 0, and so does what abstains.
    """
    below = [[torch.as_tensor(p_T, dtype=torch.float64) < threshold for p_T in group] for group in probabilities]
    return finished(spread(rewards, values, tokens), below, whiten=whiten, name="SPO's advantages")


def segment_borders(probabilities_T: Sequence[float] | Tensor, *, threshold: float, interval: int) -> list[int]:
    """The places inside a completion before every ``interval``-th token of probability below ``threshold``.

    The paper cuts one token before such a token, so that a segment begins with the uncertain choice.
    """
    below = (torch.as_tensor(probabilities_T, dtype=torch.float64) < threshold).nonzero().flatten()
    return [t for t in below[interval - 1 :: interval].tolist() if t > 0]


@register("advantage", "spo", SPOConfig, needs={Need.CONTINUATIONS})
def spo(groups: Sequence[Group], config: SPOConfig, context: Context) -> Advantages:
    """:func:`spo_advantages` with values by continuations at every cut; p is the sampled tokens' own probability.

    What an environment wrote has p = 1: it is no uncertain token.
    """
    probabilities = [[_probabilities(one) for one in group.completions] for group in groups]
    borders = [
        [segment_borders(p_T, threshold=config.threshold, interval=config.interval) for p_T in rows]
        for rows in probabilities
    ]
    tokens = [
        [segment_tokens(len(p_T), inner) for p_T, inner in zip(rows, cuts, strict=True)]
        for rows, cuts in zip(probabilities, borders, strict=True)
    ]
    values = segment_values(groups, borders, config, context)
    rewards = [as_rewards(group.rewards_G) for group in groups]
    rows = spo_advantages(rewards, values, tokens, probabilities, threshold=config.threshold, whiten=config.whiten)
    return estimate(rows, values, tokens, name="spo")


def _probabilities(completion: Completion) -> Tensor:
    p_T = torch.tensor(list(completion.logprobs), dtype=torch.float64).exp()
    return p_T.masked_fill(~written_mask(completion), 1.0) if completion.turns else p_T
