"""The core structured configs and their rules. Imports no torch. The config of a part lives in the part's own file."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rltrain.errors import ConfigError as ConfigError
from rltrain.errors import RunError as RunError
from rltrain.errors import require, require_date, require_one_of
from rltrain.losses.config import LossConfig as LossConfig
from rltrain.registry import MISSING as MISSING
from rltrain.registry import needs_of
from rltrain.registry import register as register  # where estimators of users have it from
from rltrain.runtime import weight_schedule
from rltrain.runtime.cold_starts import SCHEDULES
from rltrain.runtime.cold_starts import ColdStartConfig as ColdStartConfig
from rltrain.runtime.cold_starts import FriendlyTracesConfig as FriendlyTracesConfig
from rltrain.runtime.cold_starts import ScorerConfig as ScorerConfig
from rltrain.runtime.dates import AuditConfig
from rltrain.runtime.handbook import HandbookConfig as HandbookConfig
from rltrain.runtime.handbook import HandbookKeysConfig
from rltrain.runtime.introspection import AdaptiveConfig, IntrospectionConfig
from rltrain.runtime.records import CheckpointConfig as CheckpointConfig
from rltrain.runtime.records import DebugConfig, EarlyExitConfig, TrackingConfig
from rltrain.runtime.trees import TreeConfig as TreeConfig
from rltrain.runtime.watchdog import WatchdogConfig
from rltrain.runtime.workers import WorkersConfig
from rltrain.types import Need

# What ``apply_chat_template`` gets from us.
TEMPLATE_KEYS = ("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message")
TEMPLATE_KEYS += ("tokenize", "return_dict")


@dataclass(kw_only=True)
class PartConfig:
    """Base of the configs whose function may be a user's."""

    def user_needs(self) -> frozenset[Need]:
        """What a user's function needs beside what its part is registered with."""
        return frozenset()


@dataclass(kw_only=True)
class AdvantageConfig(PartConfig):
    """Base of every estimator's config; the function is ``f(groups, config, context) -> Advantages``."""

    def uses_rewards(self) -> bool:
        """Whether groups must be scored for it; if not, a run may have no ``rewards``."""
        return True

    def learns_from_equal_rewards(self) -> bool:
        """Whether the advantages of a group of equal rewards may differ from 0."""
        return False

    def check_run(self, run: RunConfig) -> None:
        """``ConfigError`` for settings elsewhere in ``run`` that the estimator cannot work with."""


@dataclass(kw_only=True)
class RewardConfig(PartConfig):
    """Base of every reward's config; the function is ``f(groups, config, context) -> Scores``."""

    # factor of this reward in the sum, or a schedule by step: {linear: [[0, 0.0], [100, 0.5]]}, {steps: [[0, 1.0]]}.
    weight: Any = 1.0

    def weight_at(self, step: int) -> float:
        """The weight at a step, counted from 0."""
        return weight_schedule.value_at(self.weight, step)

    def settled(self, step: int) -> Any:
        """This config with the weight of that step for good."""
        return replace(self, weight=self.weight_at(step)) if weight_schedule.is_schedule(self.weight) else self

    def longest_wait_s(self) -> float:
        """How long a rank's batch may take by the reward's own deadline; 0 for one that waits for nothing."""
        return 0.0

    def sums_turns(self) -> bool:
        """Whether the score is the sum of the turns' rewards, which estimators of turns must not count twice."""
        return False


@dataclass(kw_only=True)
class DataConfig(HandbookKeysConfig):
    """Base of every data set's config; the function is ``f(config, split) -> Sequence[Problem]``."""

    pass_rate: list[float] | None = None  # RL takes problems of a measured pass rate in [low, high] alone; null: all
    pass_rate_file: str | None = None  # the measured pass rates, written by rltrain pass_rates

    def check_pass_rate(self, key: str) -> None:
        """``ConfigError`` where one key of the filter is set without the other; ``key`` is where this config stands."""
        bounds, file = self.pass_rate, self.pass_rate_file
        require(
            (bounds is None) == (file is None),
            f"{key}.pass_rate={bounds} with {key}.pass_rate_file={file}: one without the other has no effect; set both "
            "(rltrain pass_rates measures)",
        )
        require(
            bounds is None or (len(bounds) == 2 and 0 <= bounds[0] <= bounds[1] <= 1),
            f"{key}.pass_rate={bounds}: must be [low, high] with 0 <= low <= high <= 1; [0.2, 0.8] is usual",
        )


@dataclass(kw_only=True)
class RolloutConfig:
    """Base of every rollout engine's config; the class is built as ``Engine(config, sampling, policy, seed)``.

    With ``ahead`` the next batch is sampled while this one is trained on. An engine that samples with the policy then
    has a copy of it, ``device_offset`` GPUs after the rank's.
    """

    ahead: bool = False  # sample the next batch while this one is trained on
    device_offset: int = 0  # GPUs between the rank's and its sampling copy of the policy
    tree: TreeConfig = field(default_factory=TreeConfig)

    def needed_correction(self) -> str:
        """What ``loss.importance_correction=auto`` becomes: ``truncate`` where the sampler's weights are older."""
        return "truncate" if self.ahead else "none"

    def decode_dtype(self) -> str:
        """The precision that is decoded in: ``policy`` for the policy's own."""
        return "policy"

    def rows_in_flight(self, completions: int) -> int:
        """How many of a rank's ``completions`` are decoded at once."""
        return completions

    def masks_reserved_rows(self) -> bool:
        """Whether the engine never samples the rows that an introspection head reserves."""
        return False


@dataclass(kw_only=True)
class EnvironmentConfig(WorkersConfig):
    """Base of every environment's config; the class, built as ``Environment(config)``, answers the model's turns."""

    max_turns: int = 8  # turns of the model in a completion
    turn_tokens: int = 0  # longest turn of the model; 0: no limit but sampling.max_new_tokens
    reply_tokens: int = 128  # longest observation
    long_reply: str = "cut"  # of an observation over reply_tokens: cut it, with a mark, or fail
    on_failure: str = "wrong"  # of a reply: wrong or abstain end the completion, tell lets the model read the cause

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(("cut", "fail"), "environment.long_reply", self.long_reply)
        require_one_of(("wrong", "abstain", "tell"), "environment.on_failure", self.on_failure)
        require(self.turn_tokens >= 0, f"environment.turn_tokens={self.turn_tokens}: must be >= 0; 0 sets no limit")
        for key in ("max_turns", "reply_tokens"):
            require(getattr(self, key) >= 1, f"environment.{key}={getattr(self, key)}: set at least 1")

    def told(self, cause: str) -> str:
        """What the model reads of a reply that failed, where ``on_failure=tell``."""
        return f"[{cause}]"

    def texts(self) -> Sequence[str]:
        """What the tokenizer must be able to write, beside ``Environment.stop``."""
        return ()

    def check(self, max_new_tokens: int) -> None:
        """``ConfigError`` where a completion has no room for a reply."""
        for key in ("turn_tokens", "reply_tokens"):
            require(
                getattr(self, key) < max_new_tokens,
                f"environment.{key}={getattr(self, key)}: a completion has sampling.max_new_tokens={max_new_tokens}, "
                "replies included; lower the one or raise the other",
            )

    def check_data(self, key: str, data: DataConfig) -> None:
        """``ConfigError`` where the problems of ``data``, which stands at ``key``, are none of this environment's."""


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank adapters through peft; the base weights stay frozen. ``rank=0`` trains the whole model."""

    rank: int = 0  # of the adapters; 0 trains the whole model
    alpha: float = 32.0  # adapters are scaled by alpha/rank
    dropout: float = 0.0  # on the input of the adapters
    # Names of the linear layers that get adapters.
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])


@dataclass(kw_only=True)
class ModelConfig:
    """Base of every model source's config; the function is ``f(config) -> (model, tokenizer)``.

    ``chat`` puts a problem's text into the tokenizer's chat template, after the ``system`` message and the
    ``examples``: pairs of a question and its answer, as earlier turns. The template also gets
    ``chat_template_kwargs``, and ``template_date`` where it asks for the time.
    """

    dtype: str = "float32"  # of the weights: float32 or bfloat16
    chat: bool = False  # put each problem into the tokenizer's chat template
    system: str | None = None  # the system message; needs chat
    examples: list[list[str]] = field(default_factory=list)  # [question, answer] pairs as earlier turns; needs chat
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the chat template
    template_date: str | None = None  # the date that the chat template is given, as 2024-07-26
    gradient_checkpointing: bool = False  # recompute activations in the backward pass, to save memory
    lora: LoraConfig = field(default_factory=LoraConfig)
    introspection: IntrospectionConfig = field(default_factory=IntrospectionConfig)  # docs/introspection.md

    def __post_init__(self) -> None:
        require(self.dtype in ("float32", "bfloat16"), f"model.dtype={self.dtype}: unknown; set float32 or bfloat16")
        require(
            all(len(pair) == 2 for pair in self.examples),
            "model.examples: an entry is not a pair; give [question, answer] for each",
        )
        require(
            self.chat or not (self.examples or self.system),
            "model.examples and model.system: need a chat template; set model.chat=true",
        )
        for key in self.chat_template_kwargs:
            require(key not in TEMPLATE_KEYS, f"model.chat_template_kwargs.{key}: is set by rltrain; take it out")
        require_date("model.template_date", self.template_date)


@dataclass(kw_only=True)
class SamplingConfig:
    """The distribution that completions are drawn from. ``top_k=0`` and ``top_p=1`` leave it whole."""

    temperature: float = 1.0  # logits are divided by it; the loss uses it, too
    top_k: int = 0  # sample among the k likeliest tokens; 0: all
    top_p: float = 1.0  # sample among the likeliest tokens that hold this probability; 1: all
    max_new_tokens: int = 256  # longest completion, in tokens
    max_prompt_tokens: int = 1024  # problems with longer prompts are left out
    stop: list[str] = field(default_factory=list)  # strings that end a completion

    def __post_init__(self) -> None:
        require(self.temperature >= 0, f"sampling.temperature={self.temperature}: must be >= 0 (0 is greedy)")
        require(0 < self.top_p <= 1, f"sampling.top_p={self.top_p}: must lie in (0, 1]; 1 keeps every token")
        require(self.top_k >= 0, f"sampling.top_k={self.top_k}: must be >= 0; 0 keeps every token")
        for key in ("max_new_tokens", "max_prompt_tokens"):
            require(getattr(self, key) >= 1, f"sampling.{key}={getattr(self, key)}: set at least 1")
        require(all(self.stop), "sampling.stop: holds an empty string, which stops at once; remove it")


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay on matrices; linear warm-up, then the schedule."""

    learning_rate: float = 1e-6  # the peak, after the warm-up
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # decay of AdamW's two moments
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.0  # decoupled, on matrices
    warmup_steps: int = 0  # linear rise from 0
    schedule: str = "constant"  # after the warm-up: constant, linear or cosine, to 0 at the last step
    max_grad_norm: float = 1.0  # longer gradients are scaled to it

    def __post_init__(self) -> None:
        require_one_of(SCHEDULES, "optimizer.schedule", self.schedule)
        require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate}: must be > 0")
        require(len(self.betas) == 2, f"optimizer.betas={self.betas}: set two numbers, for example [0.9,0.999]")
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps}: must be >= 0")
        require(self.max_grad_norm > 0, f"optimizer.max_grad_norm={self.max_grad_norm}: must be > 0")


@dataclass(kw_only=True)
class DeepSpeedConfig:
    """ZeRO stage and what goes with it; ``extra`` is merged into DeepSpeed's own dictionary as it is."""

    zero_stage: int = 0  # 0 to 3: shard nothing, optimiser, gradients, parameters
    offload_optimizer: bool = False  # keep the optimiser in CPU memory
    extra: dict[str, Any] = field(default_factory=dict)  # merged into DeepSpeed's own dictionary as it is

    def __post_init__(self) -> None:
        require(self.zero_stage in (0, 1, 2, 3), f"deepspeed.zero_stage={self.zero_stage}: set 0, 1, 2 or 3")
        require(
            not self.offload_optimizer or self.zero_stage >= 1,
            "deepspeed.offload_optimizer=true with zero_stage=0: nothing is sharded; set deepspeed.zero_stage>=1",
        )


@dataclass(kw_only=True)
class BatchConfig:
    """What makes one optimiser step; ``token_budget`` caps a micro-batch, ``packing`` lays it out: docs/batching.md."""

    prompts_per_step: int = 16  # problems of a step, over all ranks
    group_size: int = 8  # completions of each problem (G)
    minibatches: int = 1  # optimiser updates that the step's groups are split over
    update_epochs: int = 1  # passes over the step's groups
    token_budget: int = 16384  # most tokens of a micro-batch; lower it when memory runs out
    packing: str = "auto"  # of a micro-batch: auto, padded, packed, or shared prompts (docs/batching.md)
    dynamic_sampling: bool = False  # replace zero-variance groups until the step is full (DAPO)
    max_sampling_attempts: int = 10  # draws of dynamic sampling before the run ends

    def __post_init__(self) -> None:
        for key in ("prompts_per_step", "minibatches", "update_epochs", "token_budget", "max_sampling_attempts"):
            require(getattr(self, key) >= 1, f"batch.{key}={getattr(self, key)}: set at least 1")
        require(
            self.group_size >= 2,
            f"batch.group_size={self.group_size}: a group baseline needs at least 2 samples; set batch.group_size>=2",
        )
        require_one_of(("auto", "padded", "packed", "shared"), "batch.packing", self.packing)
        require(
            self.prompts_per_step % self.minibatches == 0,
            f"batch.minibatches={self.minibatches}: does not divide batch.prompts_per_step={self.prompts_per_step}; "
            "set a divisor of it",
        )

    @property
    def updates(self) -> int:
        """Optimiser steps on the completions of one step."""
        return self.minibatches * self.update_epochs


@dataclass(kw_only=True)
class EvaluationConfig:
    """Held-out evaluation: ``samples`` completions of each of ``problems`` problems; every 0 steps means never."""

    every_steps: int = 50  # steps between evaluations, beside the first and the last; 0: never
    problems: int = 200  # how many of the split, from its start
    samples: int = 1  # completions of each problem
    split: str = "test"  # train, validation or test
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # as in sampling
    cautious: bool = False  # of rltrain evaluate alone: trials up to the next mark where the policy is unsure
    cautious_marks: list[str] = field(default_factory=lambda: [*".,;:!?", "\n"])  # where a trial ends
    early_exit: EarlyExitConfig = field(default_factory=EarlyExitConfig)  # of rltrain evaluate alone
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)  # of rltrain evaluate alone

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, f"evaluation.every_steps={self.every_steps}: must be >= 0; 0 means never")
        require(self.samples >= 1, f"evaluation.samples={self.samples}: set at least 1")
        require(self.problems >= 1, f"evaluation.problems={self.problems}: set at least 1")
        require(
            self.samples == 1 or self.temperature > 0,
            f"evaluation.samples={self.samples} with temperature=0: all samples are the same; "
            "set evaluation.temperature=1.0 or evaluation.samples=1",
        )
        require(
            not self.cautious or self.temperature > 0,
            "evaluation.cautious=true with temperature=0: all trials are the same; set evaluation.temperature=1.0",
        )
        require(
            bool(self.cautious_marks) and all(self.cautious_marks),
            "evaluation.cautious_marks: a mark is empty, or there is none; leave the key out for punctuation",
        )


@dataclass(kw_only=True)
class CompressConfig:
    """``rltrain.compress``: which traces, how many at a time, and how the frozen model answers from the short ones.

    ``problems=0`` takes all of ``split``. A row is kept if the reward ``verifier`` gives 1 to its answer, which
    starts with ``data.before_answer`` if ``begin_answer``, as where it is scored.
    """

    split: str = "train"  # whose traces are shortened
    problems: int = 0  # how many; 0: all
    batch_size: int = 64  # traces at a time
    temperature: float = 1.0  # of the compressor
    answer_temperature: float = 0.0  # of the frozen model that answers
    max_answer_tokens: int = 256  # longest answer
    begin_answer: bool = False  # start each answer with data.before_answer
    verifier: RewardConfig | None = None

    def __post_init__(self) -> None:
        require(self.problems >= 0, f"compress.problems={self.problems}: must be >= 0; 0 takes all")
        require(self.batch_size >= 1, f"compress.batch_size={self.batch_size}: set at least 1")


@dataclass(kw_only=True)
class RunConfig:
    """Everything a run is a function of. The same file serves train, sft and evaluate."""

    name: str = "run"  # names the run folder and the wandb run
    seed: int = 0  # seeds weights, data order, sampling and dropout
    steps: int = 100  # optimiser steps of RL; 0 trains the cold start and evaluates it
    run_dir: str = "runs/${name}"  # the folder that the run writes to, and resumes from
    deadline_s: float = 1800.0  # seconds after which a wait without progress ends the run; watchdog.* sets parts of it
    max_zero_signal_steps: int = 20  # steps in a row without unequal rewards after which the run ends
    reference: str | None = None  # folder or hub name of the model that the KL is measured from; null: the first policy
    model: ModelConfig = MISSING  # the policy, and how problems become its prompts
    data: DataConfig = MISSING  # the problems to train on
    eval_data: DataConfig | None = None  # the problems to evaluate on; null: those of data, in another split
    cold_start_data: DataConfig | None = None  # what the cold start learns from; null: data
    rewards: dict[str, RewardConfig] = field(default_factory=dict)  # named rewards, whose weighted sum is trained on
    eval_rewards: dict[str, RewardConfig] = field(default_factory=dict)  # rewards of the evaluation; none: rewards
    advantage: AdvantageConfig = MISSING  # the estimator: rewards to one value per token
    loss: LossConfig = MISSING  # the policy loss: its term of a token, KL, entropy, importance correction
    rollout: RolloutConfig = MISSING  # the engine that samples completions
    environment: EnvironmentConfig | None = None  # what answers the model's turns; none: a completion is one turn
    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # the distribution that completions are drawn from
    batch: BatchConfig = field(default_factory=BatchConfig)  # what makes a step, and what a micro-batch holds
    scorer: ScorerConfig = field(default_factory=ScorerConfig)  # the model that rewards read likelihoods from
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # AdamW, warm-up and schedule
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)  # ZeRO stage and offloading
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)  # held-out: how often, on how much
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  # when to save, what to keep
    tracking: TrackingConfig = field(default_factory=TrackingConfig)  # wandb, samples, and what the console shows
    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)  # supervised fine-tuning before RL
    compress: CompressConfig = field(default_factory=CompressConfig)  # what rltrain compress shortens
    traces: FriendlyTracesConfig = field(default_factory=FriendlyTracesConfig)  # of rltrain traces
    handbook: HandbookConfig = field(default_factory=HandbookConfig)  # of rltrain handbook
    audit: AuditConfig = field(default_factory=AuditConfig)  # what rltrain audit compares by date
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)  # deadlines of the parts of a run
    debug: DebugConfig = field(default_factory=DebugConfig)  # bundles: what a step consumed and produced

    def __post_init__(self) -> None:
        require(bool(self.run_dir.strip()), "run_dir: is empty; set a folder, for example run_dir=runs/first")
        self.run_dir = os.path.expanduser(self.run_dir)  # noqa: PTH111 - Path's raises for an unknown user
        require(self.steps >= 0, f"steps={self.steps}: must be >= 0")
        require(-(2**63) <= self.seed < 2**63, f"seed={self.seed}: must lie in -2**63..2**63-1; 0 is usual")
        require(self.deadline_s > 0, f"deadline_s={self.deadline_s}: must be > 0; 1800 is usual")
        longest = self.sampling.max_prompt_tokens + self.sampling.max_new_tokens
        require(
            self.batch.token_budget >= longest,
            f"batch.token_budget={self.batch.token_budget}: below one sequence of sampling.max_prompt_tokens + "
            f"max_new_tokens = {longest}; raise it, or lower these",
        )
        ahead, offset = self.rollout.ahead, self.rollout.device_offset
        require(
            offset == 0 or (ahead and offset > 0),
            f"rollout.device_offset={offset}: must be >= 0, and has no effect without rollout.ahead=true; set 0",
        )
        if self.loss.importance_correction == "auto":
            self.loss = copy.copy(self.loss)  # keeps a key that + added, which is refused later
            self.loss.importance_correction = self.rollout.needed_correction()
        self.rollout.tree.check(self.batch.group_size)
        if self.environment is not None:
            self.environment.check(self.sampling.max_new_tokens)
            self.environment.check_wait(self.deadline_s)
        self._check_data()
        self._check_rewards()
        self.model.introspection.check_run(self)
        self.advantage.check_run(self)
        require(
            not self.loss.corrects_importance or (self.sampling.top_k == 0 and self.sampling.top_p == 1),
            "loss.importance_correction with a truncated sampler: its support differs from the trainer's; "
            "set sampling.top_k=0 sampling.top_p=1" + (", or rollout.ahead=false" if ahead else ""),
        )
        alike = "greedy completions of one prompt are all alike; set sampling.temperature>0"
        require(self.sampling.temperature > 0, f"sampling.temperature=0: {alike}")

    def _check_data(self) -> None:
        self.data.check_pass_rate("data")
        chosen = {"data": self.data, "eval_data": self.eval_data, "cold_start_data": self.cold_start_data}
        for key, data in chosen.items():
            if data is None:
                continue
            require(
                key == "data" or (data.pass_rate is None and data.pass_rate_file is None),
                f"{key}.pass_rate: filters RL's training problems alone; set it under data, or leave it out",
            )
            data.check_handbook(key)
            if self.environment is not None:
                self.environment.check_data(key, data)

    def _check_rewards(self) -> None:
        place = "rewards" if self.advantage.uses_rewards() else "eval_rewards"
        if self.advantage.uses_rewards() or (self.evaluation.every_steps and not self.eval_rewards):
            example = f"choose one, for example reward@{place}.answer=boxed"
            require(bool(self.rewards), f"{place}: none is set; {example}")
        drops = self.batch.dynamic_sampling and self.advantage.learns_from_equal_rewards()
        require(not drops, "batch.dynamic_sampling=true: drops groups that this estimator learns from; set it to false")
        rewards = {f"rewards.{name}": reward for name, reward in self.rewards.items()}
        rewards |= {f"eval_rewards.{name}": reward for name, reward in self.eval_rewards.items()}
        for key, reward in rewards.items():
            weight_schedule.check(f"{key}.weight", reward.weight)
            waits_s = reward.longest_wait_s()
            require(
                waits_s <= self.deadline_s / 2,
                f"{key}: may take {waits_s:g} s by its own deadline, and other ranks wait for at most "
                f"deadline_s={self.deadline_s:g}; set it to half of that or less",
            )

    def needs(self) -> frozenset[Need]:
        """What the chosen parts and the loss ask the trainer to compute."""
        chosen = [self.advantage, *self.rewards.values(), *self.eval_rewards.values()]
        declared = self.model.introspection.needs().union(*(needs_of(config) for config in chosen))
        return declared | ({Need.REFERENCE_LOGPROBS} if self.loss.kl_coef > 0 else frozenset())

    def deadline(self, part: str) -> float:
        """The seconds that a part of the step may take (a key of ``watchdog`` without its unit); 0 for no limit."""
        own = getattr(self.watchdog, f"{part}_s")
        return self.deadline_s if own is None else own
