"""Off-policy by one step: a thread samples the next batch while the trainer works on this one. See docs/off_policy.md.

    step k    begin: batch k+1 from theta_k    train on batch k: theta_k -> theta_{k+1}    wait    sync: theta_{k+1}

From ``wait`` to the next ``begin`` the engine is idle: there weights are pushed, evaluations and refills sampled, and
checkpoints saved. The thread samples and nothing else: it joins in no collective, and its weights do not change.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rltrain.config import RunConfig, SamplingConfig
from rltrain.errors import RunError, require
from rltrain.policy.load import Policy, load_policy
from rltrain.rollout import Rollout, RolloutLost, build_engine, engine_of, probes
from rltrain.rollout.continuation_types import ContinuationRequest
from rltrain.rollout.conversation import Answers
from rltrain.rollout.local import LocalRollout
from rltrain.rollout.probe_types import ProbeRequest, ProbeResult, ProbeSettings
from rltrain.rollout.tree import TreeRollout
from rltrain.rollout.turns import TurnRollout
from rltrain.runs import completions
from rltrain.runtime import dist
from rltrain.types import Completion, Group, Mean, Metric, Metrics, Need, Prompt

log = logging.getLogger(__name__)

TENSORS = TOKEN_IDS, LOGPROBS = "ahead/token_ids", "ahead/logprobs"

Parameters = Callable[[], Iterable[tuple[str, Tensor]]]


class Cancelled(Exception):
    """Ends the thread's work when the run ends first."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The first completions of ``step``, sampled with the weights that ``weights_step`` steps had made."""

    step: int
    weights_step: int
    groups: Sequence[Group]
    seconds: float = 0.0

    def answers(self, step: int, prompts: Sequence[Prompt]) -> bool:
        """Whether these are the completions of these prompts."""
        wanted = [(prompt.problem.id, prompt.occurrence) for prompt in prompts]
        sampled = [(group.prompt.problem.id, group.prompt.occurrence) for group in self.groups]
        return step == self.step and wanted == sampled


class Ahead:
    """An engine around ``engine``; :meth:`generate` gives what :meth:`begin` began for the same prompts.

    ``own`` is the policy that the engine was built with. Where its model is a copy, :meth:`sync` renews that from
    ``parameters``, the trained weights by name, whole one at a time. A step makes ``updates`` optimiser steps.
    Continuations are asked for while the thread samples: they come from ``present``, an engine of the policy itself,
    or from ``engine`` where that takes calls of two threads.
    """

    same_distribution = False
    uses_policy = False

    def __init__(
        self,
        engine: Rollout,
        policy: Policy,
        own: Policy,
        parameters: Parameters,
        *,
        present: Rollout | None = None,
        updates: int = 1,
        deadline_s: float = 0.0,
    ) -> None:
        self._engine, self._policy, self._own, self._parameters = engine, policy, own, parameters
        self._present, self._updates, self._deadline_s = present, updates, deadline_s
        self._weights_step = 0
        self._ready: Batch | None = None
        self._under_way: Future[Batch] | None = None
        self._staleness = Mean(total=0, count=0)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollout ahead")
        self._cancelled = threading.Event()
        if own.model is not policy.model:
            own.model.get_input_embeddings().register_forward_pre_hook(self._stop_if_cancelled)

    def generate(
        self, prompts: Sequence[Prompt], *, step: int, group_size: int, sampling: SamplingConfig | None = None
    ) -> list[Group]:
        """What was sampled ahead for these prompts of this step, or else samples of now."""
        batch = self._ready
        if sampling is not None or batch is None or not batch.answers(step, prompts):
            assert self._under_way is None, "the engine samples ahead; wait for it first"
            groups = self._engine.generate(prompts, step=step, group_size=group_size, sampling=sampling)
            batch = Batch(step=step, weights_step=self._weights_step, groups=groups)
        if sampling is None:
            age = self._updates * (self._weights_step - batch.weights_step)
            self._staleness += Mean(total=age * len(batch.groups), count=len(batch.groups))
        return list(batch.groups)

    def begin(self, prompts: Sequence[Prompt], *, step: int, group_size: int) -> None:
        """Have the thread sample the completions of ``step`` with the weights that the engine has now."""
        self._under_way = self._pool.submit(self._sample, prompts, step, group_size)

    def _sample(self, prompts: Sequence[Prompt], step: int, group_size: int) -> Batch:
        """The thread's work."""
        start_s, name = time.perf_counter(), f"rollout of step {step + 1}, ahead"
        with dist.alone(), dist.stage(name, self._deadline_s), _on(self._own.model.device):
            groups = self._engine.generate(prompts, step=step, group_size=group_size)
        seconds = time.perf_counter() - start_s
        return Batch(step=step, weights_step=self._weights_step, groups=groups, seconds=seconds)

    def wait(self) -> Metrics:
        """Wait for what was begun, on all ranks; an error of the thread is raised here.

        If its servers were lost, what was begun is dropped on all ranks, and that step samples anew. The metrics are of
        the step that ends: ``rollout/staleness``, the optimiser steps from the weights that sampled a group to those
        that its training began with; ``timing_s/rollout_ahead``, the thread's time, which is no part of the step's.
        """
        assert self._under_way is not None
        lost, self._ready = None, None
        try:
            self._ready = self._under_way.result()
        except RolloutLost as error:
            lost = str(error)
        self._under_way = None
        metrics: dict[str, Metric] = {"rollout/staleness": self._staleness}
        self._staleness = Mean(total=0, count=0)
        if losses := [one for one in dist.gather_objects(lost, name="completions sampled ahead") if one]:
            log.warning("%s; what was sampled ahead is dropped, and sampled anew", losses[0])
            self._ready = None
        if self._ready is not None:
            metrics["timing_s/rollout_ahead"] = Mean.of(self._ready.seconds)
        return metrics

    def sync(self, policy: Any) -> None:
        """Take over the policy's weights after an optimiser step; all ranks call this together, after :meth:`wait`."""
        self._weights_step += 1
        renew(self._own, policy, self._parameters)
        self._engine.sync(self._own)
        if self._present is not None:
            self._present.sync(policy)

    def probe(self, requests: Sequence[ProbeRequest], settings: ProbeSettings) -> list[ProbeResult]:
        """Continuations from inside completions, by the policy itself as it is now."""
        return probes.probe(self._policy, requests, settings)

    def continue_(self, requests: Sequence[ContinuationRequest], *, step: int) -> list[list[Completion]]:
        """Continuations from inside completions, by the policy as it is now."""
        return (self._present or self._engine).continue_(requests, step=step)

    def check(self) -> None:
        """Check the engine's decoders, if they are of this process."""
        with _on(self._own.model.device):
            check_rollout(self._engine)
        if self._present is not None:
            check_rollout(self._present)

    def close(self) -> None:
        """End the thread: a copy of the policy stops at its next token; servers answer first."""
        self._cancelled.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _stop_if_cancelled(self, *_: Any) -> None:
        if self._cancelled.is_set():
            raise Cancelled

    def state(self, step: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint of ``step`` steps keeps: the next batch of all ranks, if there is one, as JSON and tensors.

        All ranks call this together.
        """
        batch = self._ready
        if batch is None or batch.step != step:
            return {}, {}
        mine = [(group.prompt.problem.id, group.completions) for group in batch.groups]
        ranks = dist.gather_objects(mine, name="completions sampled ahead, for the checkpoint")
        groups = [group for groups in ranks for group in groups]
        flat = [completion for _, sampled in groups for completion in sampled]
        tensors = {
            TOKEN_IDS: completions.flat_ids(flat, torch.int32),
            LOGPROBS: completions.flat_logprobs(flat, torch.float64),
        }
        entries = [{"id": name, "completions": list(map(completions.facts_of, sampled))} for name, sampled in groups]
        return {"weights_step": batch.weights_step, "groups": entries}, tensors

    def restore(
        self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor], prompts: Sequence[Prompt]
    ) -> None:
        """Go on after ``step`` steps with what :meth:`state` gave; ``prompts`` are this rank's of the next one.

        All ranks call this together; there may be more or fewer of them than then.
        """
        self._weights_step = step
        if not state:
            return
        counts = dist.gather_objects(len(prompts), name="prompts of every rank")
        start = sum(counts[: dist.rank()])
        mine = slice(start, start + len(prompts))
        if [entry["id"] for entry in state["groups"][mine]] != [prompt.problem.id for prompt in prompts]:
            raise RunError(
                f"data: step {step + 1} has other problems than those that its completions in the checkpoint answer; "
                "restore the data set, or set another run_dir"
            )
        answers = _completions(state["groups"], tensors)[mine]
        groups = [Group(prompt=prompt, completions=ones) for prompt, ones in zip(prompts, answers, strict=True)]
        self._ready = Batch(step=step, weights_step=state["weights_step"], groups=groups)


def _completions(entries: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> list[tuple[Completion, ...]]:
    """The inverse of what :meth:`Ahead.state` makes of completions."""
    facts = [fact for entry in entries for fact in entry["completions"]]
    sampled = iter(completions.restored(facts, tensors[TOKEN_IDS], tensors[LOGPROBS]))
    return [tuple(next(sampled) for _ in entry["completions"]) for entry in entries]


def load_rollout(
    config: RunConfig,
    policy: Policy,
    parameters: Parameters,
    *,
    initial: str | None,
    answers: Answers | None = None,
) -> Rollout:
    """The rollout engine of a run, around it :class:`Ahead` where asked for; all ranks call this together.

    ``parameters`` gives the trained weights by the names of ``LogprobModel``; ``initial`` is where the policy's first
    weights are; ``answers`` are those of the run's environment.
    """
    if not config.rollout.ahead:
        return sampler(config, policy, answers)
    # The library's tokenizers are not made for two threads.
    own, present = dataclasses.replace(policy, tokenizer=copy.deepcopy(policy.tokenizer)), None
    if engine_of(config.rollout).uses_policy:
        own = dataclasses.replace(own, model=load_copy(config, initial))
        renew(own, policy, parameters)
        if Need.CONTINUATIONS in config.needs():
            engine = build_engine(config.rollout, config.sampling, policy, seed=config.seed)
            present = with_turns(engine, config, policy, answers)
    inner = sampler(config, own, answers)
    deadline_s = config.deadline("rollout")
    updates = config.batch.updates
    return Ahead(inner, policy, own, parameters, present=present, updates=updates, deadline_s=deadline_s)


def sampler(config: RunConfig, policy: Policy, answers: Answers | None = None) -> Rollout:
    """The engine of the config, around it the turns and trees that it asks for; it keeps entropies where wanted."""
    engine, tree = build_engine(config.rollout, config.sampling, policy, seed=config.seed), config.rollout.tree
    if isinstance(engine, LocalRollout):
        engine.keeps_entropies = Need.ENTROPY in config.needs()
    engine = with_turns(engine, config, policy, answers)
    return TreeRollout(engine, tree, config.sampling, policy) if tree.rounds else engine


def with_turns(engine: Rollout, config: RunConfig, policy: Policy, answers: Answers | None) -> Rollout:
    """The engine, around it the turns of the config's environment where there is one."""
    if config.environment is None or answers is None:
        return engine
    return TurnRollout(
        engine, answers, config.environment, config.sampling, policy, model=config.model, seed=config.seed
    )


def check_rollout(rollout: Rollout) -> None:
    """Compare what decodes in this process with the model's own forward; all ranks call this with whole weights."""
    inner = rollout
    while isinstance(inner, (TreeRollout, TurnRollout)):
        inner = inner.engine
    if isinstance(inner, (Ahead, LocalRollout)):
        inner.check()


def load_copy(config: RunConfig, initial: str | None) -> Any:
    """A second, whole model to sample with, adapters included, on this rank's GPU or ``device_offset`` further."""
    dtype = config.rollout.decode_dtype()
    plain = dataclasses.replace(config.model, gradient_checkpointing=False)
    if dtype != "policy":
        plain.dtype = dtype
    device = copy_device(config.rollout.device_offset)
    return load_policy(plain, path=initial, device=device).model.requires_grad_(False).to(device).eval()


def copy_device(offset: int) -> torch.device:
    """The device ``offset`` after this rank's, modulo those that it sees: Slurm may show each task its GPUs alone."""
    own = dist.device()
    if not offset or own.index is None:
        require(
            not offset,
            f"rollout.device_offset={offset}: there is no GPU to sample on; set 0, and the copy is beside the policy",
        )
        return own
    chosen = torch.device("cuda", (own.index + offset) % torch.cuda.device_count())
    if chosen == own:
        log.warning(
            "rollout.device_offset=%d: rank %d sees %d GPU, so it samples on %s, where it trains",
            offset, dist.rank(), torch.cuda.device_count(), own,
        )  # fmt: skip
    return chosen


@torch.no_grad()
def renew(own: Policy, policy: Policy, parameters: Parameters) -> None:
    """Give a copy of the policy the trained weights; all ranks call this together, since ZeRO 3 gathers them."""
    if own.model is not policy.model:
        copied = dict(own.model.named_parameters(prefix="model"))
        for name, theta in parameters():
            copied[name].copy_(theta)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """A new thread starts on GPU 0."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
