"""A run: its parts, built once, and what is saved of them."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rltrain import sft
from rltrain.batching.bins import Layout
from rltrain.config import RunConfig
from rltrain.data.prompts import PromptSource
from rltrain.engine.deepspeed import Engine, sharded_loading
from rltrain.environments.pool import EnvironmentPool
from rltrain.errors import ConfigError
from rltrain.evaluate import held_out_prompts
from rltrain.policy.encode import prompt_ids
from rltrain.policy.layout_check import usable_layouts
from rltrain.policy.load import Policy, load_policy
from rltrain.policy.logprobs import LogprobModel
from rltrain.policy.scorer import Scorer, load_reference, load_scorer
from rltrain.registry import part_of
from rltrain.rewards.grading import with_grades
from rltrain.rollout import Rollout, ahead, engine_of
from rltrain.rollout.ahead import Ahead, check_rollout
from rltrain.rollout.continuations import services_of
from rltrain.rollout.entropies import SampledEntropies
from rltrain.rollout.values import PredictedValues
from rltrain.runs import checkpoint, run_folder, trackers
from rltrain.runs.metrics import Accumulator
from rltrain.runs.part_states import PartStates, copies
from rltrain.runs.scope import Scope
from rltrain.runtime import dist, progress
from rltrain.runtime.interrupts import EXIT_INTERRUPTED, Interrupted
from rltrain.types import Context, Need, Prompt

log = logging.getLogger(__name__)

OldLogprobs = Literal["sampler", "current", "trainer"]


@dataclass
class Progress:
    """What a run remembers beside weights and optimiser."""

    zero_signal_steps: int = 0
    num_tokens: float = 0.0
    best_accuracy: float = -1.0
    best_step: int | None = None
    unwritten: dict[str, float] = field(default_factory=dict)  # of the newest step, until its evaluation is done


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run, built once."""

    config: RunConfig
    policy: Policy
    engine: Engine
    reference: LogprobModel | None
    scorer: Scorer | None
    rollout: Rollout
    source: PromptSource
    held_out: Sequence[Prompt]
    first_step: int
    layouts: tuple[Layout, ...]
    environment: EnvironmentPool | None = None
    progress: Progress = field(default_factory=Progress)
    states: PartStates = field(default_factory=PartStates)

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def ahead(self) -> Ahead | None:
        """The rollout engine, if it samples the next batch while this one is trained on."""
        return self.rollout if isinstance(self.rollout, Ahead) else None

    @cached_property
    def old_logprobs(self) -> OldLogprobs:
        """Where the log-probs before the update come from.

        The ``sampler``'s, where its distribution is the trainer's. Else the trainer's own: in the only update of a step
        they are the ``current`` ones, because no weight moves before its last micro-batch; of several updates, or for a
        loss that reads them before the first, they are the ``trainer``'s in a pass of their own.
        """
        sampling = self.config.sampling
        if self.rollout.same_distribution and sampling.top_k == 0 and sampling.top_p == 1:
            return "sampler"
        several = self.config.batch.updates > 1 or self.config.loss.needs_old_logprobs()
        return "trainer" if several else "current"

    @cached_property
    def entropies(self) -> SampledEntropies:
        """The service behind ``Need.ENTROPY``."""
        config = self.config
        return SampledEntropies(
            self.engine, config.sampling, token_budget=config.batch.token_budget, layouts=self.layouts
        )

    @cached_property
    def values(self) -> PredictedValues:
        """The service behind ``Need.VALUES``."""
        config, budget = self.config.model.introspection, self.config.batch.token_budget
        return PredictedValues(self.engine, config, token_budget=budget, layouts=self.layouts)

    def context(self, step: int, metrics: Accumulator | None = None) -> Context:
        """What parts may use at a step; services only where they were declared.

        ``metrics`` are those of a training step. Elsewhere parts get copies of their states, to use and forget.
        """
        services: dict[str, Any] = {}
        if self.scorer is not None:
            services["scorer"] = self.scorer
        if Need.ENTROPY in self.config.needs():
            services["entropy"] = self.entropies
        if self.config.model.introspection.head:
            services["values"] = self.values
        context = Context(
            step=step,
            seed=self.config.seed,
            max_new_tokens=self.config.sampling.max_new_tokens,
            reward_weights={name: reward.weight_at(step) for name, reward in self.config.rewards.items()},
            tokenizer=self.policy.tokenizer,
            encode=lambda prompt: prompt_ids(self.policy.tokenizer, prompt, self.config.model),
            rollout=services_of(self.config, self.rollout, step=step, metrics=metrics),
            state_of=copies(self.states.of) if metrics is None else self.states.of,
            **services,
        )
        return with_grades(context, self.config, self.policy)

    def scope(self, step: int) -> Scope:
        """What surrounds the work of a step."""
        return Scope(
            step=step,
            metrics=Accumulator(),
            deadline_s=self.config.deadline,
            weights=self._whole_weights,
            save=lambda steps: self.save(steps).path if steps > self.first_step else None,
        )

    def _whole_weights(self) -> AbstractContextManager[None]:
        """Whole weights, unless the rollout engine has its own and no part of the run asks the policy itself."""
        asks_policy = self.scorer is not None or bool({Need.PROBES, Need.ENTROPY} & self.config.needs())
        asks_policy |= self.config.model.introspection.head
        asks_policy |= Need.CONTINUATIONS in self.config.needs() and engine_of(self.config.rollout).uses_policy
        return self.engine.whole_weights() if asks_policy or self.rollout.uses_policy else nullcontext()

    def save(self, step: int) -> checkpoint.Saved:
        """A checkpoint of the run after ``step`` steps."""
        parts, tensors = {"progress": dataclasses.asdict(self.progress)}, self.scorer.tensors() if self.scorer else {}
        tensors = tensors | self.states.kept
        with dist.stage(f"checkpoint of step {step}", self.config.deadline("save")):
            if self.ahead:
                parts["ahead"], completions = self.ahead.state(step)
                tensors = tensors | completions
            saved = checkpoint.save(
                self.folder,
                step,
                engine=self.engine,
                policy=self.policy,
                parts=parts,
                tensors=tensors,
                config=run_folder.resolved(self.config),
            )
            if dist.is_main():
                best_step = self.progress.best_step
                checkpoint.prune(self.folder, self.config.checkpoint, step=step, best_step=best_step)
        return saved

    def maybe_save(self, step: int, *, signal_name: str | None) -> float:
        """Save where one is due, at a new best, at the end, and before an interrupted run leaves; returns seconds."""
        config = self.config.checkpoint
        last = step == self.config.steps
        due = config.every_steps > 0 and step % config.every_steps == 0
        best = config.keep_best and self.progress.best_step == step
        if not (last or due or best or signal_name):
            return 0.0
        start = time.perf_counter()
        saved = self.save(step)
        if dist.is_main():
            progress.say("saving", f"step {step}: {saved.path}, took {progress.clock(time.perf_counter() - start)}")
        if signal_name and not last:
            if dist.is_main():
                log.warning(
                    "%s: stopped after step %d, saved to %s; the same command resumes it", signal_name, step, saved.path
                )
            raise Interrupted(EXIT_INTERRUPTED)
        return time.perf_counter() - start


def build(config: RunConfig) -> Run:
    """Check what needs the number of ranks, load the models, and restore the newest intact checkpoint."""
    _refuse_unequal_shares(config)
    trackers.check(config.tracking)
    saved = checkpoint.resume_point(Path(config.run_dir), config)
    initial = sft.cold_start(config) if config.cold_start.is_wanted else None
    with sharded_loading(config.deepspeed, dtype=config.model.dtype):
        policy = load_policy(config.model, path=initial, device=dist.device())
    source = PromptSource(config, policy)
    held_out = held_out_prompts(config, policy) if config.evaluation.every_steps > 0 else []
    model = LogprobModel(policy.model, temperature=config.sampling.temperature)
    engine = Engine(model, config.optimizer, config.deepspeed, dtype=config.model.dtype)
    reference = load_reference(config, path=config.reference or initial)
    scorer = None
    if Need.SCORER in config.needs():
        trained = sft.scorer_cold_start(config) if config.scorer.cold_start.steps > 0 else None
        scorer = load_scorer(config, policy, engine, initial=initial, reference=reference, trained=trained)
        scorer.start(engine.full_parameters())
    progress, states, parts, tensors = Progress(), PartStates(), {}, {}
    if saved is not None:
        parts, tensors = checkpoint.load(saved, engine=engine), checkpoint.load_tensors(saved)
        progress, states = Progress(**parts["progress"]), PartStates(tensors)
        if scorer is not None:
            others = {*ahead.TENSORS, *states.kept}
            scorer.start((name, theta) for name, theta in tensors.items() if name not in others)
        log.info("resumed from %s", saved.path)
    environment = EnvironmentPool(config.environment) if config.environment is not None else None
    rollout = ahead.load_rollout(config, policy, engine.full_parameters, initial=initial, answers=environment)
    if isinstance(rollout, Ahead) and saved is not None:
        rollout.restore(saved.step, parts.get("ahead", {}), tensors, source.next(saved.step)[0])
    _log_loss(config)
    run = Run(
        config=config,
        policy=policy,
        engine=engine,
        reference=reference,
        scorer=scorer,
        rollout=rollout,
        source=source,
        held_out=held_out,
        first_step=saved.step if saved else 0,
        environment=environment,
        layouts=usable_layouts(config.batch.packing, [engine, *([reference] if reference else [])]),
        progress=progress,
        states=states,
    )
    with run.scope(run.first_step).weights():
        check_rollout(rollout)
    return run


def _refuse_unequal_shares(config: RunConfig) -> None:
    if delta := config.evaluation.early_exit.delta:
        raise ConfigError(f"evaluation.early_exit.delta={delta:g}: is of rltrain evaluate alone; leave it out")
    if budgets := config.evaluation.adaptive.budgets:
        raise ConfigError(f"evaluation.adaptive.budgets={budgets}: is of rltrain evaluate alone; leave it out")
    if config.evaluation.cautious:
        raise ConfigError(
            "evaluation.cautious=true: is of rltrain evaluate alone, since what it keeps is not the policy's "
            "distribution; leave it out, and evaluate the run's checkpoint with it"
        )
    ranks = dist.world_size()
    if config.batch.prompts_per_step % ranks:
        raise ConfigError(
            f"batch.prompts_per_step={config.batch.prompts_per_step}: not divisible by {ranks} ranks; "
            f"set a multiple of {ranks}"
        )


def _log_loss(config: RunConfig) -> None:
    """Say which correction ``loss.importance_correction=auto`` became, or was set to, and of a loss that is idle."""
    if not dist.is_main():
        return
    if config.loss.corrects_importance:
        log.info(
            "loss.importance_correction=%s: each token's loss is weighted by pi_train / pi_sampler, capped at %g",
            config.loss.importance_correction,
            config.loss.importance_cap,
        )
    if config.loss.idle_at_ratio_one() and config.batch.updates == 1:
        log.warning(
            "loss=%s: with one optimiser step per rollout all ratios are 1, where it is a plain policy gradient; set "
            "batch.minibatches or batch.update_epochs above 1",
            part_of(config.loss).name,
        )
