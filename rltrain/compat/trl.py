"""Any estimator inside TRL's GRPOTrainer: the only module that touches that trainer.

from rltrain.compat.trl import GRPOTrainer                      # instead of: from trl import GRPOTrainer
trainer = GRPOTrainer(..., advantage=TempoConfig())             # or advantage="tempo", or a function
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from rltrain.advantages.estimator import Estimator, EstimatorLike, estimator_of
from rltrain.errors import require
from rltrain.policy.load import Policy, stop_token_ids
from rltrain.rollout.probes import PolicyProber
from rltrain.types import (
    Completion,
    Context,
    Group,
    Mean,
    Need,
    Problem,
    Prompt,
    RolloutServices,
    Turn,
    UnknownLogprobs,
)

try:
    import trl
except ImportError as error:
    raise ImportError("rltrain.compat.trl needs TRL; pip install 'trl>=1.16,<1.17'") from error

HOOKS = {
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["self", "inputs"],
}


def check_hooks(trainer: type, version: str) -> None:
    """``ImportError`` unless the trainer has the two methods overridden here, with the arguments they have in 1.16."""
    for name, expected in HOOKS.items():
        method = getattr(trainer, name, None)
        taken = list(inspect.signature(method).parameters) if method else None
        if taken != expected:
            raise ImportError(
                f"trl {version}: GRPOTrainer.{name} takes {taken}, not {expected}; pip install 'trl>=1.16,<1.17'"
            )


check_hooks(trl.GRPOTrainer, metadata.version("trl"))


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """What one generation batch was scored with: this process's rows, and the rewards of all processes."""

    rows: Sequence[dict[str, Any]]
    prompts: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    rewards_per_function: Tensor


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """A completion with its prompt, as it is gathered from the processes."""

    prompt: Any
    answer: str
    prompt_ids: tuple[int, ...]
    completion: Completion


def resolve(advantage: EstimatorLike, options: Mapping[str, Any] | None = None) -> Estimator:
    """The estimator; ``ConfigError`` for one that needs what TRL's trainer cannot give."""
    estimator = estimator_of(advantage, options)
    unmet = ", ".join(sorted(need.name for need in estimator.needs - {Need.PROBES}))
    require(not unmet, f"{estimator.name}: needs {unmet}, which TRL's trainer cannot give; train with rltrain.train")
    return estimator


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's trainer with ``advantage=``: a config, a registered name or a function ``f(groups, options, context)``.

    ``advantage_options`` are the settings of a name, or what a function gets as ``options``. All other arguments are
    TRL's. The weighted sum of the reward functions goes to the estimator; a row for which all return None abstains and
    gets 0. ``scale_rewards`` has no effect: the estimator scales. Estimators that probe read the reference answer from
    the data set's column ``answer_column``. With several processes each computes all groups, as TRL itself does.
    """

    def __init__(
        self,
        *args: Any,
        advantage: EstimatorLike,
        advantage_options: Mapping[str, Any] | None = None,
        answer_column: str = "answer",
        **kwargs: Any,
    ) -> None:
        self.estimator = resolve(advantage, advantage_options)
        self.answer_column = answer_column
        super().__init__(*args, **kwargs)
        require(
            self.multi_objective_aggregation == "sum_then_normalize",
            f"multi_objective_aggregation={self.multi_objective_aggregation}: the estimator gets one reward per "
            "completion; set sum_then_normalize",
        )

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._scored = _Scored(
            rows=inputs, prompts=prompts, completion_ids=completion_ids_list, rewards_per_function=rewards
        )
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = dict(super()._generate_and_score_completions(inputs))
        mode = "train" if self._module.training else "eval"
        groups = self._groups(output, mode)
        estimated = self.estimator(groups, self._context())
        rows = _without_abstentions(groups, estimated.values)
        completions = [one for group in groups for one in group.completions]
        written = [
            row_T[torch.tensor(one.written_T, dtype=torch.bool)] for one, row_T in zip(completions, rows, strict=True)
        ]
        self._log(written, estimated.metrics, mode)

        first = self.accelerator.process_index * len(inputs)
        advantages_BT = torch.zeros(output["completion_ids"].shape, device=output["completion_ids"].device)
        for row, values_T in enumerate(rows[first : first + len(inputs)]):
            advantages_BT[row, : len(values_T)] = values_T.to(advantages_BT)
        output["advantages"] = advantages_BT
        return output

    def _groups(self, output: Mapping[str, Any], mode: str) -> list[Group]:
        """All processes' rows, which are contiguous by group."""
        from accelerate.utils import gather_object

        samples: list[_Sample] = gather_object(self._samples(output))
        rewards = self._scored.rewards_per_function
        rewards_B = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        rewards_B = rewards_B.masked_fill(rewards.isnan().all(dim=1), torch.nan).cpu()
        size: Any = self.num_generations if mode == "train" else self.num_generations_eval
        return [
            _group(str(start // size), samples[start : start + size], rewards_B[start : start + size])
            for start in range(0, len(samples), size)
        ]

    def _samples(self, output: Mapping[str, Any]) -> list[_Sample]:
        """This process's rows."""
        scored, fed = self._scored, (output["prompt_ids"], output["prompt_mask"])
        tokenizer: Any = self._tokenizer
        stop_ids = set(stop_token_ids(self._module, tokenizer))
        prompt_ids = [ids_T[mask_T.bool()] for ids_T, mask_T in zip(*fed, strict=True)]
        lengths = [len(ids) for ids in scored.completion_ids]
        logprobs = sampled_logprobs(output, lengths, not_the_samplers=self._why_old_logprobs_differ())
        turns = row_turns(output, scored.completion_ids, partial(tokenizer.decode, skip_special_tokens=True))
        return [
            _Sample(
                prompt=prompt,
                answer=str(row.get(self.answer_column, "")),
                prompt_ids=tuple(prompt_ids_T.tolist()),
                completion=Completion(
                    token_ids=tuple(ids),
                    logprobs=logprobs_T,
                    finish="stop" if len(ids) and ids[-1] in stop_ids else "length",
                    text=turns_G[-1].text if turns_G else tokenizer.decode(ids, skip_special_tokens=True),
                    turns=turns_G,
                ),
            )
            for row, prompt, prompt_ids_T, ids, logprobs_T, turns_G in zip(
                scored.rows, scored.prompts, prompt_ids, scored.completion_ids, logprobs, turns, strict=True
            )
        ]

    def _why_old_logprobs_differ(self) -> str:
        """Why the model's log-probs at generation are not those of the distribution sampled from; empty if they are."""
        if self.use_vllm:
            return "vLLM sampled, and TRL keeps only the model's here"
        arguments: Any = self.args
        if self.top_k or self.top_p < 1 or self.min_p or self.repetition_penalty != 1 or arguments.generation_kwargs:
            return "top_k, top_p, min_p, repetition_penalty or generation_kwargs change the distribution sampled from"
        model = self._module
        dropout = any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in model.modules())
        return "dropout is on while TRL samples (set disable_dropout=True)" if dropout and model.training else ""

    @property
    def _module(self) -> Any:
        """The model itself, whatever it is wrapped in."""
        return self.accelerator.unwrap_model(self.model)

    def _context(self) -> Context:
        model = self._module
        tokenizer: Any = self._tokenizer
        policy = Policy(
            model=model,
            tokenizer=tokenizer,
            stop_token_ids=stop_token_ids(model, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
        probes = Need.PROBES in self.estimator.needs
        return Context(
            step=self.state.global_step,
            seed=self.args.seed,
            max_new_tokens=self.max_completion_length or 0,
            tokenizer=tokenizer,
            rollout=RolloutServices(prober=PolicyProber(policy=policy)) if probes else RolloutServices(),
        )

    def _log(self, rows: Sequence[Tensor], metrics: Any, mode: str) -> None:
        """One number per completion, over what the model wrote, replaces TRL's own in the completions table."""
        logged = self._logs["advantages"]
        for _ in range(min(len(rows), len(logged))):
            logged.pop()
        logged.extend(float(row_T.mean()) if len(row_T) else 0.0 for row_T in rows)
        for name, metric in metrics.items():
            if isinstance(metric, Mean) and metric.count:
                self._metrics[mode][name].append(metric.total / metric.count)


NOT_KEPT = (
    "TRL keeps none where each batch trains the weights that sampled it (num_iterations=2 or use_vllm=True keeps them)"
)


def sampled_logprobs(
    output: Mapping[str, Any], lengths: Sequence[int], *, not_the_samplers: str
) -> list[tuple[float, ...] | UnknownLogprobs]:
    """The sampler's log-probs of each row of TRL's output, where TRL kept them; else :class:`UnknownLogprobs`.

    TRL's ``sampling_per_token_logps`` are the sampler's (vLLM, or a ``rollout_func``). ``old_per_token_logps`` are the
    model's at generation, which are the sampler's unless ``not_the_samplers`` says why not. They are NaN at what a tool
    wrote. A row with a sampled token that has no log-prob (NaN) is unknown.
    """
    source = "sampling_per_token_logps" if "sampling_per_token_logps" in output else "old_per_token_logps"
    if source not in output:
        return [UnknownLogprobs(reason=NOT_KEPT)] * len(lengths)
    if source == "old_per_token_logps" and not_the_samplers:
        return [UnknownLogprobs(reason=not_the_samplers)] * len(lengths)
    sampled = [sampled_T[:length] for sampled_T, length in zip(_sampled(output), lengths, strict=True)]
    return [_row_logprobs(row_T[: len(mask_T)], mask_T) for row_T, mask_T in zip(output[source], sampled, strict=True)]


def _sampled(output: Mapping[str, Any]) -> Tensor:
    """Which tokens of TRL's output the model wrote, [B, T]. Its mask is 0 at those of a tool."""
    return output["tool_mask"].bool() if "tool_mask" in output else torch.ones_like(output["completion_ids"]).bool()


def _row_logprobs(logprobs_T: Tensor, sampled_T: Tensor) -> tuple[float, ...] | UnknownLogprobs:
    if bool(logprobs_T[sampled_T].isnan().any()):
        return UnknownLogprobs(reason="the sampler gave none for some of the completion's tokens")
    return tuple(logprobs_T.where(sampled_T, torch.nan).tolist())


def row_turns(
    output: Mapping[str, Any], completion_ids: Sequence[Sequence[int]], decode: Callable[..., str]
) -> list[tuple[Turn, ...]]:
    """The turns of each row, none where no tool wrote into it.

    With ``mask_truncated_completions`` TRL's mask is 0 all over a truncated row, which then is an observation.
    """
    return [
        _turns(ids, sampled_T[: len(ids)].tolist(), decode)
        for ids, sampled_T in zip(completion_ids, _sampled(output), strict=True)
    ]


def _turns(ids: Sequence[int], sampled: Sequence[bool], decode: Callable[..., str]) -> tuple[Turn, ...]:
    if all(sampled):
        return ()
    turns, firsts = [], [i for i in range(1, len(ids)) if sampled[i] and not sampled[i - 1]]
    for start, stop in itertools.pairwise([0, *firsts, len(ids)]):
        middle = start + sum(sampled[start:stop])  # in a turn the model writes first
        text, reply = decode(ids[start:middle]), decode(ids[middle:stop])
        turns.append(Turn(written=middle - start, observed=stop - middle, called=stop > middle, text=text, reply=reply))
    return tuple(turns)


def _without_abstentions(groups: Sequence[Group], values: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """One row per completion; zeros where the reward is NaN."""
    return [
        torch.zeros_like(row_T) if abstains else row_T
        for group, rows in zip(groups, values, strict=True)
        for row_T, abstains in zip(rows, torch.as_tensor(group.rewards_G).isnan().tolist(), strict=True)
    ]


def _group(problem_id: str, samples: Sequence[_Sample], rewards_G: Tensor) -> Group:
    """One group."""
    first = samples[0]
    problem = Problem(id=problem_id, prompt=first.prompt, answer=first.answer)
    return Group(
        prompt=Prompt(problem=problem, token_ids=first.prompt_ids),
        completions=tuple(sample.completion for sample in samples),
        rewards_G=rewards_G,
    )
