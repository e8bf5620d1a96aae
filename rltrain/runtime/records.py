"""The configs of what a run keeps and shows of itself: checkpoints, tracking, bundles."""

from __future__ import annotations

from dataclasses import dataclass, field

from rltrain.errors import require, require_one_of


@dataclass(kw_only=True)
class CheckpointConfig:
    """A checkpoint every so many steps (0: only at the end); the last ``keep_last`` and the best one are kept."""

    every_steps: int = 50  # steps between checkpoints; 0: at the end alone
    keep_last: int = 2  # newest checkpoints that are kept
    keep_best: bool = True  # keep that of the best held-out accuracy, too
    resume: str = "auto"  # auto continues the run in run_dir; never refuses a used run_dir

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, f"checkpoint.every_steps={self.every_steps}: must be >= 0; 0: at the end alone")
        require(self.keep_last >= 1, f"checkpoint.keep_last={self.keep_last}: set at least 1")
        require(
            self.resume in ("auto", "never"),
            f"checkpoint.resume={self.resume}: set auto (continue the run in run_dir) or never (refuse a used run_dir)",
        )


@dataclass(kw_only=True)
class TrackingConfig:
    """Trackers beside the files. ``wandb=auto`` is online when an API key is set, else offline."""

    wandb: str = "auto"  # auto, online, offline or disabled
    tensorboard: bool = False  # write TensorBoard's files into the run folder, too
    trackio: bool = False  # send the metrics to trackio, too
    project: str = "rltrain"  # the project of wandb and trackio
    group: str | None = None  # the wandb group
    entity: str | None = None  # the wandb user or team; null: your default
    samples_every_steps: int = 10  # steps between files of samples; 0: none
    print_samples: int = 0  # show some completions with their rewards every so many steps; 0: none
    verbose: bool = False  # show the warnings of libraries (also: -v); log.txt holds them anyway

    def __post_init__(self) -> None:
        require_one_of(("auto", "online", "offline", "disabled"), "tracking.wandb", self.wandb)
        require(self.print_samples >= 0, f"tracking.print_samples={self.print_samples}: must be >= 0; 0 shows none")


@dataclass(kw_only=True)
class DebugConfig:
    """Bundles: files that hold all that a step consumed and produced, for ``scripts/replay.py``.

    ``bundle_steps`` counts as ``metrics.jsonl`` does, from 1. A non-finite value always leaves a bundle;
    ``bundle_weights`` puts the trainable weights into it.
    """

    bundle_steps: list[int] = field(default_factory=list)  # steps that leave a bundle, from 1
    bundle_weights: bool = False  # put the trainable weights into bundles

    def __post_init__(self) -> None:
        require(
            all(step >= 1 for step in self.bundle_steps),
            f"debug.bundle_steps={self.bundle_steps}: steps count from 1, as in metrics.jsonl",
        )


@dataclass(kw_only=True)
class EarlyExitConfig:
    """Of ``rltrain evaluate``: what leaving completions early would save, see :mod:`rltrain.early_exit`."""

    delta: float = 0.0  # most often that a completion is left at a wrong answer, of those that could be; 0: off
    split: str = "validation"  # of the problems that fit the probe and calibrate it
    problems: int = 400  # of that split: half of them fit, half calibrate
    cues: list[str] = field(default_factory=lambda: ["\n", "wait", "hmm", "alternatively"])  # where one may leave
    ask: str = "\\boxed{"  # text behind a cue that asks for the answer
    answer_tokens: int = 16  # longest answer there
    max_cues: int = 16  # most cues of a completion, the first ones
    l2: float = 0.01  # penalty on the probe's weights

    def __post_init__(self) -> None:
        require(0 <= self.delta < 1, f"evaluation.early_exit.delta={self.delta}: must lie in [0, 1); 0 is off")
        require(
            self.problems >= 2, f"evaluation.early_exit.problems={self.problems}: set at least 2, one for each half"
        )
        require(bool(self.cues) and all(self.cues), "evaluation.early_exit.cues: a cue is empty, or there is none")
        require(bool(self.ask), "evaluation.early_exit.ask: is empty, so that no answer is asked for; set \\boxed{")
        require(self.answer_tokens >= 1, f"evaluation.early_exit.answer_tokens={self.answer_tokens}: set at least 1")
        require(self.max_cues >= 1, f"evaluation.early_exit.max_cues={self.max_cues}: set at least 1")
        require(self.l2 > 0, f"evaluation.early_exit.l2={self.l2}: must be > 0, or separable cues have no best probe")
