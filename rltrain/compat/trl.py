"""Any registered estimator inside TRL's GRPOTrainer: the only module that touches that trainer.

from rltrain.compat.trl import GRPOTrainer                      # instead of: from trl import GRPOTrainer
trainer = GRPOTrainer(..., advantage=TempoConfig())             # or advantage="tempo"
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from rltrain.config import AdvantageConfig
from rltrain.errors import require
from rltrain.policy.load import Policy, stop_token_ids
from rltrain.registry import discover, part_of, parts
from rltrain.rollout.probes import PolicyProber
from rltrain.types import Completion, Context, Group, Mean, Need, Problem, Prompt

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
        found = list(inspect.signature(method).parameters) if method else None
        if found != expected:
            raise ImportError(
                f"trl {version}: GRPOTrainer.{name} takes {found}, not {expected}; pip install 'trl>=1.16,<1.17'"
            )


check_hooks(trl.GRPOTrainer, metadata.version("trl"))


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """What one generation batch was scored with: this process's rows, and the rewards of all processes."""

    rows: Sequence[dict[str, Any]]
    prompts: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    rewards_per_function: Tensor


def resolve(advantage: AdvantageConfig | str) -> AdvantageConfig:
    """An estimator's config, or its name for the defaults; ``ConfigError`` for one that TRL's trainer cannot serve."""
    discover()
    if isinstance(advantage, str):
        known = {part.name: part.config for part in parts("advantage")}
        require(advantage in known, f"advantage={advantage}: unknown; set one of {', '.join(known)}")
        return resolve(known[advantage]())
    unmet = part_of(advantage).needs - {Need.PROBES}
    require(not unmet, f"advantage={part_of(advantage).name}: needs {unmet}, which TRL's trainer cannot give")
    return advantage


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's trainer with ``advantage=``; all other arguments are TRL's.

    The weighted sum of the reward functions goes to the estimator; a row for which all return None abstains and gets 0.
    ``scale_rewards`` has no effect: the estimator scales. Estimators that probe read the reference answer from the
    data set's column ``answer_column``. With several processes each computes all groups, as TRL itself does.
    """

    def __init__(
        self, *args: Any, advantage: AdvantageConfig | str, answer_column: str = "answer", **kwargs: Any
    ) -> None:
        self.advantage = resolve(advantage)
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
        estimated = part_of(self.advantage).function(self._groups(mode), self.advantage, self._context())
        rows = [row_T for group in estimated.values for row_T in group]
        self._log(rows, estimated.metrics, mode)

        first = self.accelerator.process_index * len(inputs)
        advantages_BT = torch.zeros(output["completion_ids"].shape, device=output["completion_ids"].device)
        for row, values_T in enumerate(rows[first : first + len(inputs)]):
            advantages_BT[row, : len(values_T)] = values_T.to(advantages_BT)
        output["advantages"] = advantages_BT
        return output

    def _groups(self, mode: str) -> list[Group]:
        """All processes' rows, which are contiguous by group."""
        from accelerate.utils import gather_object

        scored = self._scored
        prompt_ids = self._tokenize_prompts(list(scored.prompts))[0] if self._probes else [()] * len(scored.prompts)
        answers = [str(row.get(self.answer_column, "")) for row in scored.rows]
        local = list(zip(prompt_ids, answers, scored.completion_ids, strict=True))
        rows = gather_object(local)
        rewards = scored.rewards_per_function
        rewards_B = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        rewards_B = rewards_B.masked_fill(rewards.isnan().all(dim=1), torch.nan).cpu()
        size: Any = self.num_generations if mode == "train" else self.num_generations_eval
        stop_ids = set(stop_token_ids(self._module, self._tokenizer))
        return [
            _group(str(start // size), rows[start : start + size], rewards_B[start : start + size], stop_ids)
            for start in range(0, len(rows), size)
        ]

    @property
    def _module(self) -> Any:
        """The model itself, whatever it is wrapped in."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def _probes(self) -> bool:
        return Need.PROBES in part_of(self.advantage).needs

    def _context(self) -> Context:
        model = self._module
        tokenizer: Any = self._tokenizer
        policy = Policy(
            model=model,
            tokenizer=tokenizer,
            stop_token_ids=stop_token_ids(model, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
        return Context(
            step=self.state.global_step,
            seed=self.args.seed,
            max_new_tokens=self.max_completion_length or 0,
            tokenizer=tokenizer,
            rollout=PolicyProber(policy=policy) if self._probes else None,
        )

    def _log(self, rows: Sequence[Tensor], metrics: Any, mode: str) -> None:
        """One number per completion replaces TRL's own advantages in the completions table."""
        logged = self._logs["advantages"]
        for _ in range(min(len(rows), len(logged))):
            logged.pop()
        logged.extend(float(row_T.mean()) if len(row_T) else 0.0 for row_T in rows)
        for name, metric in metrics.items():
            if isinstance(metric, Mean) and metric.count:
                self._metrics[mode][name].append(metric.total / metric.count)


def _group(problem_id: str, rows: Sequence[tuple[Any, str, Any]], rewards_G: Tensor, stop_ids: set[int]) -> Group:
    """One group of rows (prompt ids, answer, completion ids); TRL keeps no log-probs, estimators read none."""
    prompt_ids, answer, _ = rows[0]
    completions = tuple(
        Completion(
            token_ids=tuple(ids),
            logprobs=(0.0,) * len(ids),
            finish="stop" if len(ids) and ids[-1] in stop_ids else "length",
        )
        for _, _, ids in rows
    )
    problem = Problem(id=problem_id, prompt="", answer=answer)
    return Group(
        prompt=Prompt(problem=problem, token_ids=tuple(prompt_ids)), completions=completions, rewards_G=rewards_G
    )
