"""What the configs of all losses share. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rltrain.errors import require, require_one_of

if TYPE_CHECKING:
    from rltrain.types import TokenBatch

CORRECTIONS = ("auto", "none", "truncate", "mask", "sequence_truncate", "sequence_mask")


@dataclass(kw_only=True)
class LossConfig:
    """The policy loss: what all losses share; the function is ``f(logprobs_N, batch, config) -> LossTerms``.

    ``importance_correction=auto`` becomes what the rollout engine needs; without one it is ``none``. A completion that
    ``mask_truncated`` takes out still counts as a row, in the mean over sequences and in ``constant``, but its tokens
    do not count, in the mean over tokens. TRL's ``mask_truncated_completions`` does the same.
    """

    aggregation: str = "sequence"  # mean per sequence, over tokens, by a constant, or sum per sequence
    kl_coef: float = 0.0  # weight of the KL to the reference; 0: no reference is loaded
    kl_estimator: str = "k3"  # k2 or k3 (k1 only without weight)
    entropy_coef: float = 0.0  # weight of the entropy bonus
    importance_correction: str = "auto"  # for an older or other sampler: none, [sequence_]truncate or mask
    importance_cap: float = 2.0  # largest pi_train/pi_sampler of a token or completion
    mask_truncated: bool = False  # completions cut at the limit carry no loss, KL or entropy (DAPO)

    def __post_init__(self) -> None:
        require_one_of(("sequence", "token", "constant", "sequence_sum"), "loss.aggregation", self.aggregation)
        require_one_of(("k1", "k2", "k3"), "loss.kl_estimator", self.kl_estimator)
        require_one_of(CORRECTIONS, "loss.importance_correction", self.importance_correction)
        require(
            self.kl_coef == 0 or self.kl_estimator != "k1",
            f"loss.kl_estimator=k1 with loss.kl_coef={self.kl_coef}: in a loss its gradient is the score function, "
            "whose mean is zero, so it does not pull towards the reference; set loss.kl_estimator=k3 (or k2)",
        )
        require(0 <= self.kl_coef < math.inf, f"loss.kl_coef={self.kl_coef}: must be >= 0 and finite; 0 turns it off")
        require(self.entropy_coef >= 0, f"loss.entropy_coef={self.entropy_coef}: must be >= 0; 0 adds no entropy bonus")
        require(self.importance_cap >= 1, f"loss.importance_cap={self.importance_cap}: must be >= 1; 2.0 is usual")

    @property
    def corrects_importance(self) -> bool:
        """Whether a token's loss is multiplied by pi_train / pi_sampler."""
        return self.importance_correction not in ("auto", "none")

    @property
    def separable(self) -> bool:
        """Whether a token's loss depends on that token alone, so that the head may make its gradient in pieces."""
        return self.separable_surrogate() and not self.importance_correction.startswith("sequence_")

    def separable_surrogate(self) -> bool:
        """Whether the loss's own function has that property; False is always right, and slower on a CPU."""
        return False

    def needs_old_logprobs(self) -> bool:
        """Whether log-probs before the update are wanted before the first forward of a step, in a pass of their own."""
        return False

    def keeps_zero_advantages(self) -> bool:
        """Whether rows whose advantages are all 0 carry a gradient, or count in what the loss selects."""
        return self.kl_coef > 0 or self.entropy_coef > 0

    def idle_at_ratio_one(self) -> bool:
        """Whether the loss is a plain policy gradient while pi = pi_old, as in the only update of a step."""
        return False

    def marked(self, batches: Sequence[TokenBatch], name: str) -> Sequence[TokenBatch]:
        """What the loss decides of a minibatch over all ranks, before its first update: ``TokenBatch.selected_N``.

        ``name`` tells minibatches apart (seed, step, index): draws are keyed by it. All ranks call this together.
        """
        return batches
