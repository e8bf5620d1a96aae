"""The training loop.

:func:`train` is the whole step, in order. Every algorithm is a composition of data, reward, estimator and loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rltrain.advantages.estimator import estimator_of
from rltrain.batching import zero_variance
from rltrain.build import Run, build
from rltrain.config import RunConfig
from rltrain.evaluate import evaluate, evaluation_rewards
from rltrain.rewards.failures import refuse_broken
from rltrain.rewards.scoring import answers_differ, score
from rltrain.rewards.signs import sign_metrics
from rltrain.runs import run_folder
from rltrain.runs.recorder import Recorder
from rltrain.runs.scope import Scope
from rltrain.runs.step_metrics import completion_metrics, step_values
from rltrain.runtime import dist
from rltrain.runtime.interrupts import SignalWatch
from rltrain.types import Advantages, Group, Need, Sum
from rltrain.update import Minibatch, make_minibatches, update_policy


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
        if run.environment is not None:
            run.environment.close()
        recorder.close()


def train(run: Run, recorder: Recorder) -> dict[str, float]:
    """The loop. One step: prompts, completions, rewards, advantages, micro-batches, gradient, optimiser."""
    values, saving_s = first_values(run, recorder), 0.0
    with SignalWatch() as signals:
        for step in range(run.first_step, run.config.steps):
            scope = run.scope(step)
            scope.metrics.timing_s["checkpoint"] = saving_s  # after the step before
            torch.manual_seed(step_seed(run.config.seed, step))
            with scope.sampling():
                groups = collect(run, scope)
                advantages = estimate(run, scope, groups)
            with scope.stage("collate", "train"):
                minibatches = make_minibatches(run, scope, groups, advantages)
            with scope.metrics.timed("train"):
                update_policy(run, scope, minibatches)
            renew_rollout(run, scope)
            values = conclude(run, scope, recorder, groups, advantages, minibatches)
            saving_s = run.maybe_save(step + 1, signal_name=signals.received())
    return values


def step_seed(seed: int, step: int) -> int:
    """Seeds torch's generator (dropout, parts of users) anew at each step, so that a resumed run draws the same."""
    return seed * 1_000_003 + step


def collect(run: Run, scope: Scope) -> list[Group]:
    """This rank's scored groups of a step.

    With dynamic sampling (DAPO, 2503.14476) groups whose answers are all judged alike are dropped and replaced from
    further prompts until the global batch is full; which groups are kept does not depend on the number of ranks.
    """
    batch, kept, total = run.config.batch, [], 0
    for attempt in range(batch.max_sampling_attempts if batch.dynamic_sampling else 1):
        groups = draw(run, scope, attempt)
        if not batch.dynamic_sampling:
            return groups
        mixed = [group for group in groups if answers_differ(group)]
        counts = dist.gather_objects(len(mixed), name="groups with unequal rewards")
        room = batch.prompts_per_step - total - sum(counts[: dist.rank()])
        kept += mixed[: max(0, room)]
        total += sum(counts)
        scope.metrics.add({"dynamic_sampling/attempts": Sum(value=1.0 / dist.world_size())})
        if total >= batch.prompts_per_step:
            sample_ahead(run, scope)
            return kept
    raise zero_variance.ZeroVarianceError(
        f"step {scope.step}: only {total} of {batch.prompts_per_step} groups had unequal rewards after "
        f"batch.max_sampling_attempts={batch.max_sampling_attempts}; raise it, or choose data of a fitting difficulty"
    )


def draw(run: Run, scope: Scope, attempt: int) -> list[Group]:
    """Prompts, completions, rewards."""
    with scope.stage("data", "rollout"):
        prompts, dropped = run.source.next(scope.step, attempt=attempt)
        scope.metrics.add({"data/prompts_dropped": Sum(value=len(dropped))})
    with scope.stage("rollout", "rollout"):
        drawn = run.rollout.generate(prompts, step=scope.step, group_size=run.config.batch.group_size)
    if not run.config.batch.dynamic_sampling:  # else this step may need the engine again
        sample_ahead(run, scope)
    with scope.stage("reward", "reward"):
        scope.metrics.add({**completion_metrics(drawn), **sign_metrics(drawn)})
        groups, scores = score(drawn, run.config.rewards, run.context(scope.step, scope.metrics))
        scope.metrics.add(scores)
        if scope.step == run.first_step:
            refuse_broken(run.config.rewards)
            if run.environment is not None:
                run.environment.refuse_broken()
    return groups


def sample_ahead(run: Run, scope: Scope) -> None:
    """Begin to sample the first completions of the next step, where ``rollout.ahead`` asks for it.

    After the last step too, so that a run that is prolonged goes on as if it had been longer.
    """
    if run.ahead:
        with scope.stage("data", "rollout"):
            prompts, _ = run.source.next(scope.step + 1)
        run.ahead.begin(prompts, step=scope.step + 1, group_size=run.config.batch.group_size)


def estimate(run: Run, scope: Scope, groups: Sequence[Group]) -> Advantages:
    """The estimator's advantages, checked: one value per completion token."""
    with scope.stage("advantage", "rollout"):
        advantages = estimator_of(run.config.advantage)(groups, run.context(scope.step, scope.metrics))
        scope.metrics.add(advantages.metrics)
        if Need.STATE in run.config.needs():
            run.states.keep()
    return advantages


def renew_rollout(run: Run, scope: Scope) -> None:
    """Give the rollout engine the new weights, after what it samples ahead is done."""
    if run.ahead:
        with scope.stage("rollout_wait", "rollout"):
            scope.metrics.add(run.ahead.wait())
    with scope.stage("sync", "rollout"), scope.whole_weights():
        run.rollout.sync(run.policy)


def conclude(
    run: Run,
    scope: Scope,
    recorder: Recorder,
    groups: Sequence[Group],
    advantages: Advantages,
    minibatches: Sequence[Minibatch],
) -> dict[str, float]:
    """Reduce the step's metrics, evaluate where due, and write; stop after too many steps without signal."""
    steps, progress = scope.step + 1, run.progress
    progress.unwritten = step_values(
        scope.metrics,
        groups,
        [minibatch.denominators for minibatch in minibatches],
        batch=run.config.batch,
        tokens_before=progress.num_tokens,
    )
    progress.num_tokens = progress.unwritten["num_tokens"]
    if not (run.config.advantage.learns_from_equal_rewards() or run.config.model.introspection.alone):
        progress.zero_signal_steps = zero_variance.count(progress.zero_signal_steps, groups)
    with scope.saved_if_lost(steps):
        values = write(run, scope, recorder, steps)
    recorder.write_samples(steps, groups, advantages)
    zero_variance.refuse(steps, progress.zero_signal_steps, limit=run.config.max_zero_signal_steps)
    return values


def first_values(run: Run, recorder: Recorder) -> dict[str, float]:
    """The evaluation before the first step, or the one that an interrupted run still owes its newest step."""
    if run.first_step and not run.progress.unwritten:
        return {}
    return write(run, run.scope(run.first_step), recorder, run.first_step)


def write(run: Run, scope: Scope, recorder: Recorder, step: int) -> dict[str, float]:
    """The metrics of a step with those of its evaluation."""
    values = run.progress.unwritten | held_out_metrics(run, scope, recorder, step)
    run.progress.unwritten = {}
    recorder.write(step, values)
    return values


def held_out_metrics(run: Run, scope: Scope, recorder: Recorder, step: int) -> dict[str, float]:
    """The evaluation where one is due, and at the first and last step; remembers the best accuracy."""
    every = run.config.evaluation.every_steps
    if every == 0 or (step % every and step != run.config.steps):
        return {}
    recorder.announce_evaluation(step, len(run.held_out))
    with dist.stage(f"evaluation after step {step}", scope.deadline_s("evaluation")), scope.whole_weights():
        rewards, context = evaluation_rewards(run.config), run.context(step)
        values, groups = evaluate(
            run.rollout, run.held_out, rewards, run.config.evaluation, run.config.sampling, context
        )
        if step == run.first_step:
            refuse_broken(rewards)
    rows_here = run_folder.sample_rows(step, groups, None, run.policy.tokenizer)
    rows = [row for rows in dist.gather_objects(rows_here, name="held-out samples") for row in rows]
    if dist.is_main():
        run_folder.write_samples(run.folder, f"eval_step_{step:06d}", rows)
    if values.get("eval_accuracy", -1.0) > run.progress.best_accuracy:  # missing where every completion abstained
        run.progress.best_accuracy, run.progress.best_step = values["eval_accuracy"], step
    return values
