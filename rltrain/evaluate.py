"""Held-out evaluation: accuracy (avg@k) with its standard error, maj@k, unbiased pass@k, Max@k, reward, length.

python -m rltrain.evaluate +experiment=NAME [model.path=FOLDER]
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rltrain import cli, early_exit
from rltrain.config import EvaluationConfig, RewardConfig, RunConfig, SamplingConfig
from rltrain.data import mixture
from rltrain.data.boxed import last_boxed
from rltrain.data.handbook import problems_of
from rltrain.environments.pool import EnvironmentPool
from rltrain.errors import ConfigError, require
from rltrain.losses.introspection import Grid
from rltrain.policy.encode import encode_all, prompt_ids, prompt_limit, refuse_long_entries, why_left_out
from rltrain.policy.load import Policy, load_policy
from rltrain.policy.logprobs import LogprobModel
from rltrain.policy.scorer import load_scorer
from rltrain.registry import part_of
from rltrain.rewards.failures import refuse_broken
from rltrain.rewards.grading import with_grades
from rltrain.rewards.random_calculation import parse_literal
from rltrain.rewards.scoring import score
from rltrain.rewards.signs import sign_metrics
from rltrain.rollout import Rollout, adaptive, build_engine
from rltrain.rollout.ahead import check_rollout, with_turns
from rltrain.rollout.cautious import CautiousRollout
from rltrain.rollout.continuations import services_of
from rltrain.rollout.entropies import SampledEntropies
from rltrain.rollout.values import PredictedValues
from rltrain.runs.calibration import VALUES, calibration, expected_calibration_error
from rltrain.runs.handbook_metrics import handbook_metrics
from rltrain.runs.metrics import Accumulator
from rltrain.runs.turn_metrics import turn_metrics
from rltrain.runtime import dist, progress
from rltrain.types import Context, Group, Mean, Metrics, Need, Problem, Prompt, Std, Sum

log = logging.getLogger(__name__)

# Held-out completions are drawn with the keys of a step that training never reaches, the same at every evaluation:
# two evaluations of one run differ by the weights alone.
EVALUATION_STEP = -1


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k draws is right: 1 - C(n-c, k)/C(n, k) (2107.03374, eq. 1)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def held_out_problems(config: RunConfig) -> list[Problem]:
    """The first ``evaluation.problems`` of the evaluation split."""
    data, key = (config.data, "data") if config.eval_data is None else (config.eval_data, "eval_data")
    source = problems_of(data, config.evaluation.split, key)
    if len(source) == 0:
        raise ConfigError(
            f"evaluation.split={config.evaluation.split}: holds no problem; set another split or data set"
        )
    return [source[index] for index in range(min(config.evaluation.problems, len(source)))]


def evaluation_rewards(config: RunConfig) -> dict[str, RewardConfig]:
    """``eval_rewards`` where given (control runs train on a spurious one), else the training rewards."""
    return config.eval_rewards or config.rewards


def evaluation_sampling(sampling: SamplingConfig, config: EvaluationConfig) -> SamplingConfig:
    """The training sampler with the temperature and top-p of the evaluation."""
    return dataclasses.replace(sampling, temperature=config.temperature, top_p=config.top_p, top_k=0)


def evaluate(
    rollout: Rollout | CautiousRollout,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, RewardConfig],
    config: EvaluationConfig,
    sampling: SamplingConfig,
    context: Context,
) -> tuple[dict[str, float], list[Group]]:
    """Metrics named ``eval_…`` over all ranks, and this rank's scored groups.

    ``accuracy_se`` is the standard error of the accuracy: the std (ddof 1) of the problems' accuracies over sqrt(n),
    n the ``problems`` that were judged.
    """
    mine = prompts[dist.rank() :: dist.world_size()]
    drawn = rollout.generate(
        mine, step=EVALUATION_STEP, group_size=config.samples, sampling=evaluation_sampling(sampling, config)
    )
    groups, _ = score(drawn, rewards, context)
    if context.predicts_values:
        groups = with_values(groups, context)
    accumulator = Accumulator()
    for group in groups:
        accumulator.add(
            {**group_metrics(group, config.samples), **mixture.source_metrics(group), **sign_metrics([group])}
        )
    values = mixture.with_source_errors(accumulator.reduce())
    values["accuracy_se"] = values.pop("accuracy_std", 0.0) / math.sqrt(max(1.0, values["problems"]))
    values |= calibration_metrics(groups) if context.predicts_values else {}
    return {f"eval_{name}": value for name, value in values.items()}, groups


def with_values(groups: Sequence[Group], context: Context) -> list[Group]:
    """The groups with V before each token as a note of their completions. All ranks call this together."""
    return [
        dataclasses.replace(group, notes={**group.notes, VALUES: [values_T.tolist() for values_T in row]})
        for group, row in zip(groups, context.values(groups), strict=True)
    ]


def calibration_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """``introspection/ece`` over all ranks, of V before each token against the completion's reward."""
    here = [
        (value, reward)
        for group in groups
        if group.rewards_G is not None
        for values, reward in zip(group.notes[VALUES], group.rewards_G.tolist(), strict=True)
        for value in map(float, values)
    ]
    pairs = [pair for rank in dist.gather_objects(here, name="predicted values") for pair in rank]
    bins = calibration([value for value, _ in pairs], [reward for _, reward in pairs])
    return {"introspection/ece": expected_calibration_error(bins)} if bins else {}


def group_metrics(group: Group, samples: int) -> Metrics:
    """What is right is ``Group.right_G``, for accuracy and pass@k alike; abstentions are neither right nor wrong."""
    assert group.rewards_G is not None and group.right_G is not None
    rewards_G = group.rewards_G[~group.rewards_G.isnan()]
    judged_G = group.right_G[~group.right_G.isnan()]
    right, judged = int(judged_G.sum()), len(judged_G)
    ks = [k for k in (2**power for power in range(1, 11)) if k <= judged]
    metrics = {
        "accuracy": Mean(total=right, count=judged),
        "accuracy_std": Std.of(torch.tensor([right / judged] if judged else [])),
        "problems": Sum(value=float(judged > 0)),
        "abstained": Mean(total=samples - judged, count=samples),
        "reward": Mean.of(rewards_G),
        "completions/mean_length": Mean.of([len(one.token_ids) for one in group.completions]),
        "completions/clipped_ratio": Mean.of([one.finish == "length" for one in group.completions]),
    }
    if len(rewards_G) and samples > 1:
        metrics[f"max@{samples}"] = Mean.of(float(rewards_G.max()))
    if samples > 1 and judged:
        shown = zip(group.completions, group.right_G.tolist(), strict=True)
        votes = [(completion.text, bool(right)) for completion, right in shown if not math.isnan(right)]
        metrics[f"maj@{samples}"] = Mean.of(majority(*zip(*votes, strict=True)))
    metrics |= {f"pass@{k}": Mean.of(pass_at_k(judged, right, k)) for k in ks}
    return metrics | handbook_metrics([group]) | turn_metrics(group.completions)


def majority(texts: Sequence[str], right: Sequence[bool]) -> float:
    """maj@k: the share of right completions among those of the most frequent answer; of equally frequent ones the mean.

    An answer is the content of the last box, else what follows the last ``=``, else the last line. Numbers are compared
    by value. Completions without an answer do not vote.
    """
    votes: dict[Hashable, list[bool]] = {}
    for text, is_one in zip(texts, right, strict=True):
        if (answer := final_answer(text)) is not None:
            votes.setdefault(answer, []).append(is_one)
    most = max(map(len, votes.values()), default=0)
    shares = [sum(each) / len(each) for each in votes.values() if len(each) == most]
    return sum(shares) / len(shares) if shares else 0.0


def final_answer(text: str) -> Hashable | None:
    """What a completion votes for, see :func:`majority`."""
    lines = text.strip().splitlines()
    answer = last_boxed(text) or (lines[-1].rpartition("=")[2].strip() if lines else "")
    number = parse_literal(answer) if answer else None
    return number if number is not None else answer or None


def held_out_prompts(config: RunConfig, policy: Policy) -> list[Prompt]:
    """Encoded held-out problems; those over the prompt limit, or refused by the chat template, are left out."""
    limit = prompt_limit(policy, config.sampling)
    prompts, dropped = encode_all(policy, held_out_problems(config), config.model, max_prompt_tokens=limit)
    if dropped:
        refuse_long_entries(policy, dropped, config.model, max_prompt_tokens=limit)
        reason = why_left_out(policy, dropped[0], config.model, max_prompt_tokens=limit)
        if not prompts:
            raise ConfigError(f"evaluation: no held-out problem makes a prompt, the first is {reason}")
        log.warning("%d held-out prompts are left out, the first is %s", len(dropped), reason)
    return prompts


def sampler_of(config: RunConfig, policy: Policy) -> Rollout:
    """The rollout engine outside a run, with the environment's turns where there is one."""
    environment = EnvironmentPool(config.environment) if config.environment is not None else None
    engine = build_engine(config.rollout, config.sampling, policy, seed=config.seed)
    rollout = with_turns(engine, config, policy, environment)
    check_rollout(rollout)
    return rollout


def context_of(config: RunConfig, policy: Policy, rollout: Rollout) -> Context:
    """What rewards may use outside a run."""
    services: dict[str, Any] = {}
    if Need.SCORER in config.needs():
        services["scorer"] = load_scorer(config, policy, LogprobModel(policy.model, temperature=1.0))
    if Need.ENTROPY in config.needs():
        model = LogprobModel(policy.model, temperature=1.0)
        services["entropy"] = SampledEntropies(model, config.sampling, token_budget=config.batch.token_budget)
    if config.model.introspection.head:
        services["values"] = values_of(config, policy)
    context = Context(
        seed=config.seed,
        tokenizer=policy.tokenizer,
        encode=lambda prompt: prompt_ids(policy.tokenizer, prompt, config.model),
        max_new_tokens=config.sampling.max_new_tokens,
        rollout=services_of(config, rollout, step=EVALUATION_STEP),
        **services,
    )
    return with_grades(context, config, policy)


def values_of(config: RunConfig, policy: Policy) -> PredictedValues:
    """What the policy's introspection head predicts, outside a run."""
    model = LogprobModel(policy.model, temperature=1.0)
    return PredictedValues(model, config.model.introspection, token_budget=config.batch.token_budget)


def main(config: RunConfig) -> None:
    """Evaluate the configured model on held-out problems; prints the metrics and writes ``evaluation.json``."""
    dist.setup(deadline_s=config.deadline("collective"), join_s=config.deadline("join"))
    policy = load_policy(config.model, device=dist.device())
    policy.model.to(dist.device())
    rollout = sampler_of(config, policy)
    context = context_of(config, policy, rollout)
    refuse_early_exits(config, rollout)
    refuse_adaptive(config)
    prompts = held_out_prompts(config, policy)
    with dist.stage("evaluation", config.deadline("evaluation")):
        rewards = {name: reward.settled(config.steps) for name, reward in evaluation_rewards(config).items()}
        asked = f"{len(prompts)} problems of {part_of(config.eval_data or config.data).name}, {config.evaluation.split}"
        progress.say("evaluation", f"{asked}: {in_words(config.evaluation)}")
        drawing = rollout
        if config.evaluation.cautious:
            marks = config.evaluation.cautious_marks
            drawing = CautiousRollout(rollout, policy, config.sampling, marks=marks, seed=config.seed)
        metrics, _ = evaluate(drawing, prompts, rewards, config.evaluation, config.sampling, context)
        if isinstance(drawing, CautiousRollout):
            metrics["eval_trials_per_segment"] = drawing.trials / max(1, drawing.segments)
        refuse_broken(rewards)
        greedy = metrics
        if config.evaluation.temperature > 0:
            settings = dataclasses.replace(config.evaluation, temperature=0.0, samples=1, cautious=False)
            progress.say("evaluation", f"{asked}: {in_words(settings)}")
            greedy, _ = evaluate(rollout, prompts, rewards, settings, config.sampling, context)
        exits = early_exits(config, policy, rollout, context, prompts)
        adapted = adaptive_sampling(config, policy, rollout, context, prompts)
    if dist.is_main():
        facts = about(config)
        path = Path(config.run_dir) / "evaluation.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        written = {**metrics, **facts, "greedy": greedy} | ({"early_exit": exits} if exits else {})
        written |= {"adaptive": adapted} if adapted else {}
        path.write_text(json.dumps(written, indent=1))
        print(table(facts, metrics, greedy, config.evaluation))
        if exits:
            print("\nearly exit\n" + "\n".join(f"{name:28s}{value:.4g}" for name, value in exits.items()))
        if adapted:
            print("\nadaptive sampling, and votes at as many tokens\n" + adaptive.table(adapted))
        print(f"\nwritten to {path}")


def refuse_early_exits(config: RunConfig, rollout: Rollout) -> None:
    """``ConfigError`` where early exits are asked for and cannot be measured."""
    delta = config.evaluation.early_exit.delta
    if delta:
        name = f"evaluation.early_exit.delta={delta:g}"
        require(dist.world_size() == 1, f"{name}: runs in one process; start one rank")
        require(rollout.uses_policy, f"{name}: reads the hidden states of a local policy; set rollout=local")
        require(config.environment is None, f"{name}: does not follow turns; set environment=none")
        require(not config.evaluation.cautious, f"{name}: is of plain sampling; set evaluation.cautious=false")


def early_exits(
    config: RunConfig, policy: Policy, rollout: Rollout, context: Context, held_out: Sequence[Prompt]
) -> dict[str, float]:
    """What leaving early does to completions drawn as the evaluation's (:mod:`rltrain.early_exit`), where asked for."""
    asked = config.evaluation.early_exit
    if not asked.delta:
        return {}
    evaluation = dataclasses.replace(config.evaluation, split=asked.split, problems=asked.problems)
    training = held_out_prompts(dataclasses.replace(config, evaluation=evaluation), policy)
    asking = early_exit.Asking(
        rollout=rollout,
        policy=policy,
        rewards={name: reward.settled(config.steps) for name, reward in evaluation_rewards(config).items()},
        context=context,
        config=asked,
        step=EVALUATION_STEP,
        sampling=evaluation_sampling(config.sampling, config.evaluation),
    )
    return early_exit.measure(asking, training, held_out)


def refuse_adaptive(config: RunConfig) -> None:
    """``ConfigError`` where adaptive sampling is asked for and cannot be measured."""
    if budgets := config.evaluation.adaptive.budgets:
        name = f"evaluation.adaptive.budgets={budgets}"
        require(dist.world_size() == 1, f"{name}: runs in one process; start one rank")
        head = config.model.introspection.head
        require(head, f"{name}: the policy has no introspection head; set model.introspection.head=true")
        warm = config.evaluation.temperature > 0
        require(warm, f"{name} with temperature=0: all completions are the same; set evaluation.temperature=1.0")


def adaptive_sampling(
    config: RunConfig, policy: Policy, rollout: Rollout, context: Context, held_out: Sequence[Prompt]
) -> list[dict[str, float]]:
    """Accuracy and tokens of sampling by the head's predictions, beside votes, where asked for."""
    asked = config.evaluation.adaptive
    if not asked.budgets:
        return []
    evaluation = dataclasses.replace(config.evaluation, split=asked.split, problems=asked.problems)
    training = held_out_prompts(dataclasses.replace(config, evaluation=evaluation), policy)
    known, tried = (predicted(config, policy, rollout, context, prompts) for prompts in (training, held_out))
    return adaptive.measure(known, tried, asked.budgets)


def predicted(
    config: RunConfig, policy: Policy, rollout: Rollout, context: Context, prompts: Sequence[Prompt]
) -> adaptive.Problems:
    """``evaluation.adaptive.samples`` completions of each problem, drawn as the evaluation's, with predictions."""
    rewards = {name: reward.settled(config.steps) for name, reward in evaluation_rewards(config).items()}
    asked, grid = config.evaluation.adaptive, Grid.of(config.model.introspection)
    sampling = evaluation_sampling(config.sampling, config.evaluation)
    drawn = rollout.generate(prompts, step=EVALUATION_STEP, group_size=asked.samples, sampling=sampling)
    groups, _ = score(drawn, rewards, context)
    joints = values_of(config, policy).joint(groups)
    completions = []
    for group, row in zip(groups, joints, strict=True):
        assert group.right_G is not None
        shown = zip(row, group.completions, group.right_G.nan_to_num(0.0).tolist(), strict=True)
        completions.append(
            [adaptive.Predicted.of(joint, grid.middles_B, right=right, text=one.text) for joint, one, right in shown]
        )
    return adaptive.Problems(completions=completions, rewards=grid.rewards, answer=final_answer, stretch=asked.stretch)


def in_words(config: EvaluationConfig) -> str:
    """How completions are drawn."""
    how = "cautious" if config.cautious else "samples"
    return "greedy" if config.temperature == 0 else f"{config.samples} {how} each at {config.temperature:g}"


def about(config: RunConfig) -> dict[str, str]:
    """Which model on which data, for the table and ``evaluation.json``."""
    model = vars(config.model).get("path") or f"{part_of(config.model).name} (not trained)"
    return {
        "model": str(model),
        "data": part_of(config.eval_data or config.data).name,
        "split": config.evaluation.split,
        "drawn": in_words(config.evaluation),
    }


def table(
    facts: Mapping[str, str], sampled: Mapping[str, float], greedy: Mapping[str, float], config: EvaluationConfig
) -> str:
    """The facts, then a line per metric with what was sampled and, where that is another, what was greedy."""
    both = config.temperature > 0
    heads = [facts["drawn"], "greedy"] if both else ["greedy"]
    width = max(24, *(len(name.removeprefix("eval_completions/").removeprefix("eval_")) + 1 for name in sampled))
    lines = [f"{name:{width}s}{facts[name]}" for name in ("model", "data", "split")]
    lines += [
        f"{'problems (n)':{width}s}{int(sampled['eval_problems'])}",
        "",
        " " * width + "".join(f"{h:>24s}" for h in heads),
    ]
    for name, value in sampled.items():
        short = name.removeprefix("eval_")
        if short.startswith("problems") or short.endswith("_se"):
            continue
        shown = f"avg@{config.samples} (accuracy)" if short == "accuracy" else short.removeprefix("completions/")
        cells = [_cell(name, value, sampled), *([_cell(name, greedy.get(name), greedy)] if both else [])]
        lines.append(f"{shown:{width}s}" + "".join(f"{cell:>24s}" for cell in cells))
    return "\n".join(lines)


def _cell(name: str, value: float | None, values: Mapping[str, float]) -> str:
    if value is None:
        return "-"
    error = values.get(f"{name}_se")
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    cli.run(main)
