"""Configs of supervised fine-tuning before RL, of its traces, and of the model phi, which may be trained that way."""

from __future__ import annotations

from dataclasses import dataclass, field

from rltrain.errors import require, require_one_of

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(kw_only=True)
class ColdStartConfig:
    """Supervised fine-tuning before RL, with TRL's SFTTrainer, on ``problem.meta[solution_field]``; 0 steps: none."""

    steps: int = 0  # optimiser steps; 0: no cold start
    batch_size: int = 64  # examples of a step
    learning_rate: float = 1e-3  # AdamW's, after the warm-up
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])  # decay of AdamW's two moments
    warmup_steps: int = 30  # linear rise from 0
    schedule: str = "constant"  # constant, linear or cosine
    order: str = "shuffled"  # of the examples: shuffled, or data for the order of the data set
    objective: str = "likelihood"  # likelihood, or curio, which keeps the starting model's entropy (CurioSFT)
    curio_alpha: float = 1.0  # weight of curio's squared distance from the tempered starting model
    weight_decay: float = 0.0  # decoupled
    problems: int = 50_000  # at most so many of the training split
    max_length: int = 1024  # longer examples are left out, in tokens
    solution_field: str = "solution"  # the entry of problem.meta that holds the worked solution
    path: str | None = None  # start RL from this trained cold start (a folder cold_start) instead of training it
    share: bool = True  # take it from the folder cold_starts beside run_dir, and leave it there for other runs

    def __post_init__(self) -> None:
        require_one_of(SCHEDULES, "cold_start.schedule", self.schedule)
        require_one_of(("shuffled", "data"), "cold_start.order", self.order)
        require_one_of(("likelihood", "curio"), "cold_start.objective", self.objective)
        require(self.curio_alpha >= 0, f"cold_start.curio_alpha={self.curio_alpha}: must be >= 0; 1 is the paper's")
        require(
            self.objective == "curio" or self.curio_alpha == 1,
            f"cold_start.curio_alpha={self.curio_alpha}: has no effect with cold_start.objective={self.objective}; "
            "set cold_start.objective=curio",
        )
        require(self.steps >= 0, f"cold_start.steps={self.steps}: must be >= 0; 0 trains nothing before RL")
        require(self.batch_size >= 1, f"cold_start.batch_size={self.batch_size}: set at least 1")

    @property
    def is_wanted(self) -> bool:
        """Whether RL starts from a fine-tuned model."""
        return self.steps > 0 or self.path is not None


@dataclass(kw_only=True)
class ScorerConfig:
    """The model phi that rewards read likelihoods from: the ``policy``, a ``frozen`` model, or the policy's ``ema``.

    Frozen is the initial policy, or the model at ``path``, which must share the policy's vocabulary, or one that the
    run trains first, in ``run_dir/scorer``, by a ``cold_start`` of its own from the weights of ``model``. The EMA is
    kept in fp32: ``phi <- decay·phi + (1 - decay)·theta`` after each optimiser step.
    """

    kind: str = "frozen"  # policy, frozen, or ema
    path: str | None = None  # of a frozen model that shares the policy's vocabulary; null: the initial policy
    decay: float = 0.999  # of the EMA
    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)

    def __post_init__(self) -> None:
        require_one_of(("policy", "frozen", "ema"), "scorer.kind", self.kind)
        require(0 <= self.decay < 1, f"scorer.decay={self.decay}: must lie in [0, 1); 0.999 is usual")
        require(
            self.path is None or self.kind == "frozen",
            f"scorer.path with scorer.kind={self.kind}: has no effect; set scorer.kind=frozen or leave the path out",
        )
        require(
            self.cold_start.steps == 0 or (self.kind == "frozen" and self.path is None),
            f"scorer.cold_start.steps={self.cold_start.steps} with scorer.kind={self.kind}, scorer.path={self.path}: "
            "has no effect; set scorer.kind=frozen and no path, or scorer.cold_start.steps=0",
        )

    @property
    def is_initial(self) -> bool:
        """Whether a frozen phi is the initial policy."""
        return self.path is None and self.cold_start.steps == 0


@dataclass(kw_only=True)
class FriendlyTracesConfig:
    """``rltrain traces``: solutions that a ``teacher`` writes and the model, the student, finds likely.

    ``threshold=0`` vetoes nothing: the traces are the teacher's.
    """

    teacher: str = ""  # folder or hub name of a model with the student's vocabulary; the student is model
    threshold: float = 0.01  # least probability under the student of a token that the teacher proposes
    tries: int = 5  # of the teacher, before the student writes the token itself
    temperature: float = 0.7  # of both models' draws
    top_p: float = 0.95  # of both models' draws
    top_k: int = 20  # of both models' draws; 0: all
    keep: str = "right"  # right, by the run's rewards, or stopped: all that did not run into the limit
    split: str = "train"  # whose problems are solved
    problems: int = 0  # how many; 0: all
    batch_size: int = 64  # problems at a time

    def __post_init__(self) -> None:
        require(0 <= self.threshold <= 1, f"traces.threshold={self.threshold}: must lie in [0, 1]; 0 vetoes nothing")
        require_one_of(("right", "stopped"), "traces.keep", self.keep)
        require(self.tries >= 1, f"traces.tries={self.tries}: set at least 1")
        require(self.temperature > 0, f"traces.temperature={self.temperature}: must be > 0; every try would be equal")
        require(0 < self.top_p <= 1, f"traces.top_p={self.top_p}: must lie in (0, 1]")
        require(self.top_k >= 0, f"traces.top_k={self.top_k}: must be >= 0; 0 keeps all")
        require(self.problems >= 0, f"traces.problems={self.problems}: must be >= 0; 0 takes all")
        require(self.batch_size >= 1, f"traces.batch_size={self.batch_size}: set at least 1")
