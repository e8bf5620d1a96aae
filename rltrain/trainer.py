"""The training loop, and what it is built from.

:func:`train` is the whole step, in order. Every algorithm is a composition of data, reward, estimator and loss.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rltrain import sft
from rltrain.batching import zero_variance
from rltrain.batching.bins import Layout
from rltrain.batching.collate import Denominators, collate, padding_share
from rltrain.config import RunConfig
from rltrain.data.prompts import PromptSource
from rltrain.engine.deepspeed import Engine, NonFiniteError, learning_rate, sharded_loading
from rltrain.errors import ConfigError
from rltrain.evaluate import evaluate, evaluation_rewards, held_out_prompts
from rltrain.policy.layout_check import usable_layouts
from rltrain.policy.load import Policy, load_policy
from rltrain.policy.logprobs import LogprobModel, loss_and_logprobs, to_device
from rltrain.policy.scorer import Scorer, load_reference, load_scorer
from rltrain.registry import part_of
from rltrain.rewards.scoring import score
from rltrain.rollout import RolloutLost, ahead
from rltrain.rollout.ahead import Ahead
from rltrain.runs import checkpoint, run_folder, step_dump
from rltrain.runs.metrics import Accumulator
from rltrain.runs.recorder import Recorder
from rltrain.runs.step_dump import StepRecord
from rltrain.runtime import dist, watchdog
from rltrain.runtime.interrupts import EXIT_INTERRUPTED, Interrupted, SignalWatch
from rltrain.types import Context, Group, Max, Mean, Min, Need, Prompt, Sum, TokenBatch

log = logging.getLogger(__name__)


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
    rollout: Any
    source: PromptSource
    held_out: Sequence[Prompt]
    first_step: int
    layouts: tuple[Layout, ...]
    progress: Progress = field(default_factory=Progress)

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def ahead(self) -> Ahead | None:
        """The rollout engine, if it samples the next batch while this one is trained on."""
        return self.rollout if isinstance(self.rollout, Ahead) else None

    def context(self, step: int) -> Context:
        """What parts may use at a step; services only where they were declared."""
        probes = Need.PROBES in self.config.needs()
        return Context(
            step=step,
            seed=self.config.seed,
            max_new_tokens=self.config.sampling.max_new_tokens,
            tokenizer=self.policy.tokenizer,
            rollout=self.rollout if probes else None,
            scorer=self.scorer,
        )


def fit(config: RunConfig) -> dict[str, float]:
    """Build, train, and return the metrics of the last step."""
    dist.setup(deadline_s=config.deadline("collective"), join_s=config.deadline("join"))
    torch.manual_seed(config.seed)
    with SignalWatch(at_once=True), dist.stage("start of the run", deadline_s=0):
        run = build(config)
    recorder = Recorder(run.folder, config, first_step=run.first_step, tokenizer=run.policy.tokenizer)
    try:
        values = train(run, recorder)
        recorder.summarise()
        return values
    finally:
        if run.ahead:
            run.ahead.close()
        recorder.close()


def train(run: Run, recorder: Recorder) -> dict[str, float]:
    """The loop. One step: prompts, completions, rewards, advantages, micro-batches, gradient, optimiser."""
    config, values, saving_s = run.config, {}, 0.0
    estimator = part_of(config.advantage).function
    if run.first_step == 0 or run.progress.unwritten:
        values = write(run, recorder, run.first_step)
    with SignalWatch() as signals:
        for step in range(run.first_step, config.steps):
            metrics, context = Accumulator(), run.context(step)
            metrics.timing_s["checkpoint"] = saving_s  # after the step before
            torch.manual_seed(step_seed(config.seed, step))
            with saved_if_lost(run, step), sampling_weights(run):
                groups = collect(run, context, metrics)
                with stage(run, context, metrics, "advantage", "rollout"):
                    advantages = estimator(groups, config.advantage, context)
                    metrics.add(advantages.metrics)
            with stage(run, context, metrics, "collate", "train"):
                batches, denominators = micro_batches(run, groups, advantages.values)
                metrics.add({"padding_share": padding_share(batches)})
                batches = with_fixed_logprobs(run, batches)
            with metrics.timed("train"):
                for epoch in range(config.batch.update_epochs):
                    record = StepRecord(step + 1, epoch, groups, advantages.values, batches)
                    with watchdog.rescues(partial(step_dump.write_alone, config, record)):
                        update(run, record, metrics)
            if run.ahead:
                with stage(run, context, metrics, "rollout_wait", "rollout"):
                    metrics.add(run.ahead.wait())
            with stage(run, context, metrics, "sync", "rollout"), sampling_weights(run):
                run.rollout.sync(run.policy)
            run.progress.unwritten = step_values(run, step, groups, metrics, denominators)
            run.progress.zero_signal_steps = zero_variance.count(run.progress.zero_signal_steps, groups)
            with saved_if_lost(run, step + 1):
                values = write(run, recorder, step + 1)
            recorder.write_samples(step + 1, groups, advantages)
            zero_variance.refuse(step + 1, run.progress.zero_signal_steps, limit=config.max_zero_signal_steps)
            saving_s = maybe_save(run, step + 1, signal_name=signals.received())
    return values


def write(run: Run, recorder: Recorder, step: int) -> dict[str, float]:
    """The metrics of a step with those of its evaluation."""
    values = run.progress.unwritten | held_out_metrics(run, step)
    run.progress.unwritten = {}
    recorder.write(step, values)
    return values


@contextmanager
def stage(run: Run, context: Context, metrics: Accumulator, name: str, deadline: str) -> Iterator[None]:
    """Time a part of the step, name it for whoever waits in it, and give it the deadline ``watchdog.<deadline>_s``."""
    with metrics.timed(name), dist.stage(f"{name} of step {context.step + 1}", run.config.deadline(deadline)):
        yield


@contextmanager
def sampling_weights(run: Run) -> Iterator[None]:
    """Whole weights, unless the rollout engine has its own and no part of the run asks the policy itself."""
    asked = run.scorer is not None or Need.PROBES in run.config.needs()
    with ExitStack() as held:
        if asked or getattr(run.rollout, "uses_policy", True):
            with dist.stage("gathering the weights", run.config.deadline("collective")):
                held.enter_context(run.engine.whole_weights())
        yield


@contextmanager
def saved_if_lost(run: Run, step: int) -> Iterator[None]:
    """Where no rollout engine is left, save what ``step`` steps have taught before the error ends the run."""
    try:
        yield
    except RolloutLost as error:
        if step > run.first_step:
            saved = save(run, step)
            raise RolloutLost(f"{error}; saved to {saved.path}, the same command resumes it") from error
        raise


def step_seed(seed: int, step: int) -> int:
    """Seeds torch's generator (dropout, parts of users) anew at each step, so that a resumed run draws the same."""
    return seed * 1_000_003 + step


def update(run: Run, record: StepRecord, metrics: Accumulator) -> None:
    """One optimiser step over the record's micro-batches, whose losses add up to the loss of the step."""
    batches, step, deadline_s = record.batches, record.step, run.config.deadline("train")
    for index, batch in enumerate(batches):
        with dist.stage(f"micro-batch {index + 1} of {len(batches)} of step {step}", deadline_s):
            output, logprobs_N = loss_and_logprobs(run.engine, batch, run.config.loss)
            run.engine.backward(output.loss, last=index == len(batches) - 1)
        record.add(output.loss, logprobs_N)
        metrics.add(output.metrics)
        if record.epoch == 0:
            metrics.add(sampler_difference(logprobs_N.detach(), batch))
    rate = learning_rate(step - 1, run.config.optimizer, total_steps=run.config.steps)
    with (
        step_dump.kept(run.config, record, run.engine.full_parameters),
        dist.stage(f"optimiser of step {step}", deadline_s),
    ):
        refuse_non_finite(record)
        record.grad_norm = run.engine.step(learning_rate=rate)
    metrics.add({"grad_norm": Mean.of(record.grad_norm), "learning_rate": Mean.of(rate)})
    if run.scorer is not None:
        metrics.add(run.scorer.follow(run.engine.full_parameters()))


def collect(run: Run, context: Context, metrics: Accumulator) -> list[Group]:
    """This rank's scored groups of a step.

    With dynamic sampling (DAPO, 2503.14476) groups of equal rewards are dropped and replaced from further prompts
    until the global batch is full; which groups are kept does not depend on the number of ranks.
    """
    batch, kept, total = run.config.batch, [], 0
    for attempt in range(batch.max_sampling_attempts if batch.dynamic_sampling else 1):
        groups = draw(run, context, metrics, attempt)
        if not batch.dynamic_sampling:
            return groups
        mixed = [group for group in groups if not zero_variance.is_zero_variance_group(group)]
        counts = dist.gather_objects(len(mixed), name="groups with unequal rewards")
        room = batch.prompts_per_step - total - sum(counts[: dist.rank()])
        kept += mixed[: max(0, room)]
        total += sum(counts)
        metrics.add({"dynamic_sampling/attempts": Sum(value=1.0 / dist.world_size())})
        if total >= batch.prompts_per_step:
            sample_ahead(run, context, metrics)
            return kept
    raise zero_variance.ZeroVarianceError(
        f"step {context.step}: only {total} of {batch.prompts_per_step} groups had unequal rewards after "
        f"batch.max_sampling_attempts={batch.max_sampling_attempts}; raise it, or choose data of a fitting difficulty"
    )


def draw(run: Run, context: Context, metrics: Accumulator, attempt: int) -> list[Group]:
    """Prompts, completions, rewards."""
    with stage(run, context, metrics, "data", "rollout"):
        prompts, dropped = run.source.next(context.step, attempt=attempt)
        metrics.add({"data/prompts_dropped": Sum(value=len(dropped))})
    with stage(run, context, metrics, "rollout", "rollout"):
        drawn = run.rollout.generate(prompts, step=context.step, group_size=run.config.batch.group_size)
    if not run.config.batch.dynamic_sampling:  # else this step may need the engine again
        sample_ahead(run, context, metrics)
    with stage(run, context, metrics, "reward", "reward"):
        groups, scores = score(drawn, run.config.rewards, context)
        metrics.add(scores)
    return groups


def sample_ahead(run: Run, context: Context, metrics: Accumulator) -> None:
    """Begin to sample the first completions of the next step, where asked for; after the last step too, so that a run
    that is prolonged goes on as if it had been longer."""
    if run.ahead:
        with stage(run, context, metrics, "data", "rollout"):
            prompts, _ = run.source.next(context.step + 1)
        run.ahead.begin(prompts, step=context.step + 1, group_size=run.config.batch.group_size)


def micro_batches(
    run: Run, groups: Sequence[Group], advantages: Sequence[Sequence[Tensor]]
) -> tuple[list[TokenBatch], Denominators]:
    """This rank's micro-batches on its device; rows that cannot move the policy are left out."""
    config = run.config
    batches, denominators = collate(
        groups,
        advantages,
        aggregation=config.loss.aggregation,
        token_budget=config.batch.token_budget,
        max_new_tokens=config.sampling.max_new_tokens,
        keep_zero_advantages=config.loss.kl_coef > 0 or config.loss.entropy_coef > 0,
        layouts=run.layouts,
        hidden_size=run.policy.model.config.get_text_config().hidden_size,
    )
    return [to_device(batch, dist.device()) for batch in batches], denominators


@torch.no_grad()
def with_fixed_logprobs(run: Run, batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """Add what stays fixed during the update: the reference model's log-probs, and the trainer's own old ones where the
    sampler's are of another distribution (truncated, another engine, older weights). One update needs no pass for
    these: they are its own log-probs, because no weight moves before its last micro-batch."""
    sampling = run.config.sampling
    foreign = sampling.top_k > 0 or sampling.top_p < 1 or not getattr(run.rollout, "same_distribution", True)
    fixed = []
    for batch in batches:
        added = {}
        if foreign:
            several = run.config.batch.update_epochs > 1
            added["old_logprobs_N"] = run.engine(batch, entropy=False)[0] if several else None
        if run.reference is not None:
            added["reference_logprobs_N"] = run.reference(batch, entropy=False)[0]
        fixed.append(dataclasses.replace(batch, **added))
    return fixed


def sampler_difference(logprobs_N: Tensor, batch: TokenBatch) -> dict[str, Any]:
    """How far the sampler's log-probs are from the trainer's before the first update."""
    real_N = batch.weights_N > 0
    if not bool(real_N.any()):
        return {}
    difference_N = (logprobs_N - batch.sampler_logprobs_N)[real_N].abs()
    return {
        "sampling/sampling_logp_difference/mean": Mean.of(difference_N),
        "sampling/sampling_logp_difference/max": Max(value=float(difference_N.max())),
    }


def refuse_non_finite(record: StepRecord) -> None:
    """Stop every rank before the optimiser moves when any micro-batch of any rank has a loss that is not finite."""
    mine = [(dist.rank(), index + 1) for index, loss in enumerate(record.losses) if not bool(torch.isfinite(loss))]
    bad = [one for ones in dist.gather_objects(mine, name="finite check of the losses") for one in ones]
    if bad:
        raise NonFiniteError(
            f"step {record.step}: the loss of {len(bad)} micro-batches is not finite, the first is micro-batch "
            f"{bad[0][1]} of rank {bad[0][0]}"
        )


def step_values(
    run: Run, step: int, groups: Sequence[Group], metrics: Accumulator, denominators: Denominators
) -> dict[str, float]:
    """The reduced metrics of a step."""
    lengths = [len(one.token_ids) for group in groups for one in group.completions]
    tokens = sum(len(group.prompt.token_ids) * len(group.completions) for group in groups) + sum(lengths)
    if lengths:
        metrics.add(
            {
                "completions/max_length": Max(value=float(max(lengths))),
                "completions/min_length": Min(value=float(min(lengths))),
            }
        )
    metrics.add(
        {
            "completions/mean_length": Mean.of(lengths),
            "completions/clipped_ratio": Mean.of([o.finish == "length" for g in groups for o in g.completions]),
            "tokens_of_step": Sum(value=float(tokens)),
        }
    )
    values = metrics.reduce()
    run.progress.num_tokens += values.pop("tokens_of_step")
    step_time_s = sum(metrics.timing_s.values())
    return values | {
        **{name: values[name] / run.config.batch.update_epochs for name in ("loss", "policy_tokens")},
        "num_tokens": run.progress.num_tokens,
        "loss_denominator/tokens": denominators.tokens,
        "loss_denominator/rows": denominators.rows,
        "timing_s/step": step_time_s,
        "perf/throughput": sum(lengths) * dist.world_size() / step_time_s,
    }


def held_out_metrics(run: Run, step: int) -> dict[str, float]:
    """The evaluation where one is due, and at the first and last step; remembers the best accuracy."""
    every = run.config.evaluation.every_steps
    if every == 0 or (step % every and step != run.config.steps):
        return {}
    deadline_s = run.config.deadline("evaluation")
    with dist.stage(f"evaluation after step {step}", deadline_s), sampling_weights(run):
        values, groups = evaluate(
            run.rollout,
            run.held_out,
            evaluation_rewards(run.config),
            run.config.evaluation,
            run.config.sampling,
            run.context(step),
        )
    mine = run_folder.sample_rows(step, groups, None, run.policy.tokenizer)
    rows = [row for rows in dist.gather_objects(mine, name="held-out samples") for row in rows]
    if dist.is_main():
        run_folder.write_samples(run.folder, f"eval_step_{step:06d}", rows)
    if values["eval_accuracy"] > run.progress.best_accuracy:
        run.progress.best_accuracy, run.progress.best_step = values["eval_accuracy"], step
    return values


def maybe_save(run: Run, step: int, *, signal_name: str | None) -> float:
    """Save where one is due, at a new best, at the end, and before an interrupted run leaves; returns the seconds."""
    config = run.config.checkpoint
    last = step == run.config.steps
    due = config.every_steps > 0 and step % config.every_steps == 0
    best = config.keep_best and run.progress.best_step == step
    if not (last or due or best or signal_name):
        return 0.0
    start = time.perf_counter()
    saved = save(run, step)
    if signal_name and not last:
        if dist.is_main():
            log.warning(
                "%s: stopped after step %d, saved to %s; the same command resumes it", signal_name, step, saved.path
            )
        raise Interrupted(EXIT_INTERRUPTED)
    return time.perf_counter() - start


def save(run: Run, step: int) -> checkpoint.Saved:
    """A checkpoint of the run after ``step`` steps."""
    parts, tensors = {"progress": dataclasses.asdict(run.progress)}, run.scorer.tensors() if run.scorer else {}
    with dist.stage(f"checkpoint of step {step}", run.config.deadline("save")):
        if run.ahead:
            parts["ahead"], completions = run.ahead.state(step)
            tensors = tensors | completions
        saved = checkpoint.save(
            run.folder,
            step,
            engine=run.engine,
            policy=run.policy,
            parts=parts,
            tensors=tensors,
            config=run_folder.resolved(run.config),
        )
        if dist.is_main():
            checkpoint.prune(run.folder, run.config.checkpoint, step=step, best_step=run.progress.best_step)
    return saved


def build(config: RunConfig) -> Run:
    """Check what needs the number of ranks, load the models, and restore the newest intact checkpoint."""
    ranks = dist.world_size()
    if config.batch.prompts_per_step % ranks:
        raise ConfigError(
            f"batch.prompts_per_step={config.batch.prompts_per_step}: not divisible by {ranks} ranks; "
            f"set a multiple of {ranks}"
        )
    folder = Path(config.run_dir)
    saved = checkpoint.resume_point(folder, config)
    if saved is None and dist.is_main():
        run_folder.write_provenance(folder, config)
    initial = sft.cold_start(config) if config.cold_start.steps > 0 else None
    with sharded_loading(config.deepspeed, dtype=config.model.dtype):
        policy = load_policy(config.model, path=initial)
    source = PromptSource(config, policy)
    held_out = held_out_prompts(config, policy) if config.evaluation.every_steps > 0 else []
    engine = Engine(
        LogprobModel(policy.model, temperature=config.sampling.temperature),
        config.optimizer,
        config.deepspeed,
        dtype=config.model.dtype,
    )
    reference = load_reference(config, path=config.reference or initial)
    scorer = None
    if Need.SCORER in config.needs():
        scorer = load_scorer(config, policy, engine, initial=initial, reference=reference)
        scorer.start(engine.full_parameters())
    progress, parts, tensors = Progress(), {}, {}
    if saved is not None:
        parts, tensors = checkpoint.load(saved, engine=engine), checkpoint.load_tensors(saved)
        progress = Progress(**parts["progress"])
        if scorer is not None:
            scorer.start((name, theta) for name, theta in tensors.items() if name not in ahead.TENSORS)
        log.info("resumed from %s", saved.path)
    rollout = ahead.load_rollout(config, policy, engine.full_parameters, initial=initial)
    if isinstance(rollout, Ahead) and saved is not None:
        rollout.restore(saved.step, parts.get("ahead", {}), tensors, source.next(saved.step)[0])
    return Run(
        config=config,
        policy=policy,
        engine=engine,
        reference=reference,
        scorer=scorer,
        rollout=rollout,
        source=source,
        held_out=held_out,
        first_step=saved.step if saved else 0,
        layouts=usable_layouts(config.batch.packing, [engine, *([reference] if reference else [])]),
        progress=progress,
    )
