"""The config of the introspection head: ``model.introspection``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rltrain.errors import require
from rltrain.types import Need

if TYPE_CHECKING:
    from rltrain.config import RunConfig

LENGTHS = (0, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(kw_only=True)
class IntrospectionConfig:
    """Reserved rows of the vocabulary, read as a grid over remaining length and reward (docs/introspection.md)."""

    head: bool = False  # reserve the rows, and mask them as tokens
    lengths: list[int] = field(default_factory=lambda: list(LENGTHS))  # first remaining length of each bin, in tokens
    rewards: list[float] = field(default_factory=lambda: [0.0, 1.0])  # the reward that each bin stands for
    first_row: int | None = None  # the first reserved row; null: that behind the tokenizer's last token
    append_rows: bool = True  # append the rows that the model lacks; false refuses such a model
    weight: float = 1.0  # of the head's loss beside the policy's; 0 leaves the head as it is
    trunk: bool = True  # let the head's gradient reach the whole model; false trains the reserved rows alone
    alone: bool = False  # no policy loss: the head's loss and the KL to the reference train the model
    kl_coef: float = 10.0  # of alone: factor of the KL to the reference's next-token distribution
    kl_tokens: int = 32  # of alone: its likeliest tokens, which that KL tells apart

    def __post_init__(self) -> None:
        key = "model.introspection"
        rising = all(low < high for low, high in zip(self.lengths, self.lengths[1:], strict=False))
        require(
            len(self.lengths) >= 2 and self.lengths[0] == 0 and rising,
            f"{key}.lengths={self.lengths}: must rise from 0 and hold two bins at least; [0,4,8,16] is an example",
        )
        rising = all(low < high for low, high in zip(self.rewards, self.rewards[1:], strict=False))
        require(
            len(self.rewards) >= 2 and rising,
            f"{key}.rewards={self.rewards}: must rise and hold two bins at least; [0,1] for right and wrong",
        )
        require(self.weight >= 0, f"{key}.weight={self.weight:g}: must be >= 0; 0 leaves the head as it is")
        require(self.kl_coef >= 0, f"{key}.kl_coef={self.kl_coef:g}: must be >= 0; 10 is usual")
        require(self.kl_tokens >= 1, f"{key}.kl_tokens={self.kl_tokens}: set at least 1; 32 is usual")
        require(
            self.first_row is None or self.first_row >= 0,
            f"{key}.first_row={self.first_row}: must be >= 0; null takes the rows behind the tokenizer's tokens",
        )
        require(self.head or not self.alone, f"{key}.alone=true: there is no head to train; set {key}.head=true")
        require(
            not self.alone or self.weight > 0, f"{key}.alone=true with weight=0: trains nothing; set {key}.weight=1"
        )

    @property
    def cells(self) -> int:
        """How many rows the grid takes."""
        return len(self.lengths) * len(self.rewards)

    @property
    def keeps_policy(self) -> bool:
        """Whether a KL to the reference holds the policy."""
        return self.alone and self.kl_coef > 0

    def needs(self) -> frozenset[Need]:
        """What the head's training asks the trainer to compute."""
        return frozenset({Need.REFERENCE_LOGPROBS}) if self.keeps_policy else frozenset()

    def check_run(self, run: RunConfig) -> None:
        """``ConfigError`` for settings elsewhere in a run that the head cannot work with."""
        if not self.head:
            return
        key = "model.introspection.head=true"
        require(
            bool(run.rewards) or not self.is_trained,
            f"{key}: learns from rewards, and the run has none; choose one, for example reward@rewards.answer=boxed, "
            "or set model.introspection.weight=0",
        )
        require(run.model.lora.rank == 0, f"{key}: adapters leave the reserved rows frozen; set model.lora.rank=0")
        require(run.deepspeed.zero_stage < 3, f"{key}: its rows must be whole; set deepspeed.zero_stage<=2")
        require(run.environment is None, f"{key}: does not follow turns; set environment=none")
        require(
            run.rollout.masks_reserved_rows(),
            f"{key}: this rollout engine would sample the reserved rows as tokens; set rollout=local",
        )

    @property
    def is_trained(self) -> bool:
        """Whether a run's completions train the head."""
        return self.head and self.weight > 0


@dataclass(kw_only=True)
class AdaptiveConfig:
    """Of ``rltrain evaluate``: sampling by the introspection head's predictions against a majority vote."""

    budgets: list[float] = field(default_factory=list)  # mean tokens of a problem, one measurement each; empty: off
    samples: int = 8  # completions that a problem may take
    stretch: int = 8  # tokens between two decisions
    split: str = "validation"  # of the problems that the price of a token is found on
    problems: int = 200  # how many of that split

    def __post_init__(self) -> None:
        key = "evaluation.adaptive"
        require(all(budget > 0 for budget in self.budgets), f"{key}.budgets={self.budgets}: must be > 0 tokens")
        require(self.samples >= 2, f"{key}.samples={self.samples}: set at least 2, among which to choose")
        require(self.stretch >= 1, f"{key}.stretch={self.stretch}: set at least 1 token")
        require(self.problems >= 1, f"{key}.problems={self.problems}: set at least 1")
