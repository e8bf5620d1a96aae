"""From groups and advantages to moved weights: minibatches, micro-batches, loss, gradient, optimiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rltrain.batching.collate import Denominators, collate, padding_share
from rltrain.batching.masks import Masks, loss_masks, truncated_metrics
from rltrain.batching.minibatches import split
from rltrain.build import Run
from rltrain.engine.deepspeed import NonFiniteError, learning_rate
from rltrain.losses.introspection import refuse_uncovered, top_tokens
from rltrain.policy.logprobs import HeadTraining, inference, logprobs, micro_batch_loss, of_logits, to_device, unwrapped
from rltrain.runs import step_dump
from rltrain.runs.scope import Scope
from rltrain.runs.step_dump import StepRecord
from rltrain.runs.step_metrics import sampler_difference
from rltrain.runtime import dist, watchdog
from rltrain.types import Advantages, Group, Mean, TokenBatch


@dataclass(frozen=True, kw_only=True)
class Minibatch:
    """The groups of one optimiser step, and the micro-batches that they became."""

    groups: Sequence[Group]
    advantages: Sequence[Sequence[Tensor]]
    masks: Masks
    batches: Sequence[TokenBatch]
    denominators: Denominators

    def record(self, step: int, epoch: int, index: int) -> StepRecord:
        """What its update in ``epoch`` fills; ``step`` counts from 1, ``index`` from 0."""
        return StepRecord(step, epoch, self.groups, self.advantages, self.batches, minibatch=index, masks=self.masks)


def make_minibatches(run: Run, scope: Scope, groups: Sequence[Group], advantages: Advantages) -> list[Minibatch]:
    """The rollout in ``batch.minibatches`` parts, each weighted by its own denominators.

    Their old log-probs are those before the first update. Advantages were estimated over the whole rollout.
    """
    made = []
    if run.config.model.introspection.is_trained:
        refuse_uncovered(groups, run.config.model.introspection, scope.step)
    cut = run.config.loss.mask_truncated
    masks = loss_masks(groups, advantages.masks, mask_truncated=cut)
    scope.metrics.add(truncated_metrics(groups) if cut else {})
    parts = split(len(groups), run.config.batch.minibatches, seed=run.config.seed, step=scope.step)
    for index, part in enumerate(parts):
        some, values = [groups[i] for i in part], [advantages.values[i] for i in part]
        masked = [masks[i] for i in part] if masks else ()
        batches, denominators = micro_batches(run, some, values, masked)
        scope.metrics.add({"padding_share": padding_share(batches)})
        batches = with_fixed_logprobs(run, batches)
        batches = run.config.loss.marked(batches, f"{run.config.seed:d}/{scope.step:d}/{index:d}")
        made.append(Minibatch(groups=some, advantages=values, masks=masked, batches=batches, denominators=denominators))
    return made


def micro_batches(
    run: Run, groups: Sequence[Group], advantages: Sequence[Sequence[Tensor]], masks: Masks = ()
) -> tuple[list[TokenBatch], Denominators]:
    """This rank's micro-batches on its device; rows that cannot move the policy are left out."""
    config = run.config
    batches, denominators = collate(
        groups,
        advantages,
        aggregation=config.loss.aggregation,
        token_budget=config.batch.token_budget,
        max_new_tokens=config.sampling.max_new_tokens,
        keep_zero_advantages=config.loss.keeps_zero_advantages() or config.model.introspection.is_trained,
        masks=masks,
        layouts=run.layouts,
        hidden_size=run.policy.model.config.get_text_config().hidden_size,
    )
    return [to_device(batch, dist.device()) for batch in batches], denominators


@torch.no_grad()
def with_fixed_logprobs(run: Run, batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """Add what stays fixed during the update: old log-probs (:attr:`Run.old_logprobs`) and the reference model's."""
    fixed = []
    for batch in batches:
        added = {}
        if run.old_logprobs != "sampler":
            added["old_logprobs_N"] = _without_dropout(run, batch) if run.old_logprobs == "trainer" else None
        if run.reference is not None and run.config.loss.kl_coef > 0:
            added["reference_logprobs_N"] = logprobs(run.reference, batch, entropy=False).logprobs_N
        if run.reference is not None and run.config.model.introspection.keeps_policy:
            count = run.config.model.introspection.kl_tokens
            top_NJ = of_logits(run.reference, batch, partial(top_tokens, count=count))  # J = 2K
            ids_NK, added["top_logprobs_NK"] = top_NJ.chunk(2, dim=-1)
            added["top_NK"] = ids_NK.long()
        fixed.append(dataclasses.replace(batch, **added))
    return fixed


def _without_dropout(run: Run, batch: TokenBatch) -> Tensor:
    """The trainer's log-probs of the distribution that was sampled from, in which LoRA drops nothing."""
    with inference(unwrapped(run.engine)):
        return logprobs(run.engine, batch, entropy=False).logprobs_N


def update_policy(run: Run, scope: Scope, minibatches: Sequence[Minibatch]) -> None:
    """``batch.update_epochs`` times one optimiser step per minibatch."""
    for epoch in range(run.config.batch.update_epochs):
        for index, minibatch in enumerate(minibatches):
            update(run, scope, minibatch.record(scope.step + 1, epoch, index), _head_training(run, minibatch))


def _head_training(run: Run, minibatch: Minibatch) -> HeadTraining | None:
    """How the completions train the policy's introspection head, where it has one."""
    config = run.config.model.introspection
    return HeadTraining(config=config, tokens=minibatch.denominators.tokens) if config.is_trained else None


def update(run: Run, scope: Scope, record: StepRecord, head: HeadTraining | None = None) -> None:
    """One optimiser step over the record's micro-batches, whose losses add up to the loss of the step."""
    with watchdog.rescues(partial(step_dump.write_alone, run.config, record)):
        for index, batch in enumerate(record.batches):
            with scope.named(f"micro-batch {index + 1} of {len(record.batches)}", "train"):
                output = micro_batch_loss(run.engine, batch, run.config.loss, head)
                run.engine.backward(output.loss, last=index == len(record.batches) - 1)
            record.add(output.loss, output.logprobs_N)
            scope.metrics.add(output.metrics)
            if record.is_first:
                scope.metrics.add(sampler_difference(output.logprobs_N, batch))
        move_policy(run, scope, record)


def move_policy(run: Run, scope: Scope, record: StepRecord) -> None:
    """Clip, finite check, optimiser; then what follows the policy."""
    rate = learning_rate(scope.step, run.config.optimizer, total_steps=run.config.steps)
    with (
        step_dump.kept(run.config, record, run.engine.full_parameters),
        scope.named("optimiser", "train"),
    ):
        refuse_non_finite(record)
        record.grad_norm = run.engine.step(learning_rate=rate)
    scope.metrics.add({"grad_norm": Mean.of(record.grad_norm), "learning_rate": Mean.of(rate)})
    if run.scorer is not None:
        scope.metrics.add(run.scorer.follow(run.engine.full_parameters()))


def refuse_non_finite(record: StepRecord) -> None:
    """Stop every rank before the optimiser moves when any micro-batch of any rank has a loss that is not finite."""
    here = [(dist.rank(), index + 1) for index, loss in enumerate(record.losses) if not bool(torch.isfinite(loss))]
    bad = [place for places in dist.gather_objects(here, name="finite check of the losses") for place in places]
    if bad:
        raise NonFiniteError(
            f"step {record.step}: the loss of {len(bad)} micro-batches is not finite, the first is micro-batch "
            f"{bad[0][1]} of rank {bad[0][0]}"
        )
