"""Completions of a prompt with the probability of each token, by a model or by the newest checkpoint of a run.

python -m rltrain.commands.sample MODEL_OR_RUN "PROMPT" [--answer GOLD] [--n 4] [--temperature 1] [--seed 0]

The prompt is used as it is, in the chat template where the run has one. With ``--answer`` a run's rewards judge each
completion. On a terminal the colour of a token is its probability; elsewhere the probabilities stand below the text.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from rltrain import cli
from rltrain.config import DataConfig, EnvironmentConfig, ModelConfig, RewardConfig, SamplingConfig
from rltrain.data.handbook import with_handbook
from rltrain.environments.pool import EnvironmentPool
from rltrain.errors import ConfigError, require
from rltrain.policy.encode import encode_all, why_left_out
from rltrain.policy.load import Policy, PretrainedConfig, config_of, load_policy
from rltrain.registry import discover, parts
from rltrain.rewards.scoring import score
from rltrain.rollout import Rollout
from rltrain.rollout.local import LocalRollout, LocalRolloutConfig
from rltrain.rollout.turns import TurnRollout
from rltrain.runs import checkpoint, run_folder
from rltrain.runtime import progress
from rltrain.types import Completion, Context, Group, Problem

# Colours of a terminal for a token of at most this probability; likelier tokens have none.
COLOURS = ((0.1, 41), (0.3, 43), (0.6, 46), (0.9, 42))


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model and where its weights are, how it samples, and the rewards and the environment of its run."""

    model: ModelConfig
    path: str | None
    sampling: SamplingConfig
    rewards: Mapping[str, RewardConfig]
    environment: EnvironmentConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)


def source_of(name: str) -> Source:
    """What a run folder, a folder with a model, or a name on the hub means."""
    discover()
    held = run_folder.config_of(Path(name))
    if held is None:
        model = PretrainedConfig(path=name)
        return Source(model=model, path=None, sampling=SamplingConfig(), rewards={})
    saved = checkpoint.newest_intact(Path(name))
    policy = saved.policy if saved else Path(name) / "cold_start"
    if not policy.is_dir():
        raise ConfigError(f"{name}: holds no checkpoint and no cold start; train it first")
    known, steps = {part.name: part.config for part in parts("reward")}, held.get("steps", 0)
    rewards = {key: _reward(known, key, dict(value)).settled(steps) for key, value in held.get("rewards", {}).items()}
    sampling = _known(SamplingConfig, held.get("sampling", {}))
    return Source(
        model=config_of(held["model"]),
        path=str(policy),
        sampling=sampling,
        rewards=rewards,
        environment=_environment(held.get("environment")),
        data=_known(DataConfig, held.get("data", {})),
    )


def _environment(plain: Mapping[str, Any] | None) -> EnvironmentConfig | None:
    """An environment's config from its plain form; older runs have none."""
    if plain is None:
        return None
    known = {part.name: part.config for part in parts("environment")}
    if plain["kind"] not in known:
        raise ConfigError(f"environment={plain['kind']}: not registered here; import the file that registers it")
    return _known(known[plain["kind"]], plain)


def _reward(known: Mapping[str, type], key: str, plain: dict[str, Any]) -> RewardConfig:
    """A reward's config from its plain form, in which a key ``kind`` of its own stands in place of the part's name."""
    alike = [config for config in known.values() if {"kind", *plain} == {entry.name for entry in fields(config)}]
    if len(alike) == 1:
        return alike[0](**plain)
    kind = plain.pop("kind")
    if kind not in known:
        raise ConfigError(f"rewards.{key}={kind}: not registered here; import the file that registers it")
    return _known(known[kind], plain)


def _known(config: type, plain: Mapping[str, Any]) -> Any:
    """A config from its plain form, without keys of another version."""
    names = {entry.name for entry in fields(config)}
    return config(**{key: value for key, value in plain.items() if key in names})


def sample(
    source: Source, prompt: str, *, n: int, seed: int, answer: str | None = None, tags: Sequence[str] = ()
) -> Group:
    """``n`` completions of a prompt, judged by the run's rewards where there is an answer.

    The entries of the run's handbook are in the prompt, by tag those of ``tags``. ConfigError for a prompt that is too
    long or that the chat template refuses.
    """
    problem = advised(source.data, Problem(id="prompt", prompt=prompt, answer=answer or ""), tags)
    policy = load_policy(source.model, path=source.path)
    limit = source.sampling.max_prompt_tokens
    prompts, dropped = encode_all(policy, [problem], source.model, max_prompt_tokens=limit)
    if dropped:
        raise ConfigError(why_left_out(policy, problem, source.model, max_prompt_tokens=limit))
    with _rollout(source, policy, seed=seed) as rollout:
        groups = rollout.generate(prompts, step=0, group_size=n)
    if answer is not None:
        context = Context(seed=seed, tokenizer=policy.tokenizer, max_new_tokens=source.sampling.max_new_tokens)
        groups, _ = score(groups, source.rewards, context)
    return replace(
        groups[0], notes={"tokens": [texts(policy.tokenizer, each.token_ids) for each in groups[0].completions]}
    )


def advised(data: DataConfig, problem: Problem, tags: Sequence[str]) -> Problem:
    """The problem with the entries of the run's handbook, where it has one."""
    by_tag = data.handbook is not None and data.handbook_by == "tag"
    require(by_tag or not tags, "--tag: the run's data have no handbook that is read by tag; leave it out")
    require(
        bool(tags) or not by_tag,
        f"--tag: none is given, and data.handbook={data.handbook} is read by tag; give the prompt's, --tag TAG",
    )
    meta = {data.handbook_tag: list(tags)}
    return with_handbook([replace(problem, meta=meta)], data)[0] if by_tag else with_handbook([problem], data)[0]


@contextmanager
def _rollout(source: Source, policy: Policy, *, seed: int) -> Iterator[Rollout]:
    """The local engine, with the run's environment where it has one."""
    engine = LocalRollout(LocalRolloutConfig(), source.sampling, policy, seed=seed)
    if source.environment is None:
        yield engine
        return
    pool = EnvironmentPool(source.environment)
    try:
        yield TurnRollout(engine, pool, source.environment, source.sampling, policy, model=source.model, seed=seed)
    finally:
        pool.close()


def texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Each token's text."""
    return [tokenizer.decode([token]) for token in token_ids]


def shown(group: Group, *, colours: bool) -> str:
    """The completions of a group as text, each behind its number, its reward, its length and its probability."""
    blocks = []
    for index, completion in enumerate(group.completions):
        probabilities = [math.exp(value) for value in completion.logprobs]
        likely = math.prod(value for value in probabilities if not math.isnan(value))
        reward = "" if group.rewards_G is None else f"reward {float(group.rewards_G[index]):.3g}, "
        cut = ", cut at the limit" if completion.finish == "length" else ""
        head = f"[{index + 1}] {reward}{len(completion.token_ids)} tokens, probability {likely:.3g}{cut}"
        tokens = [str(token) for token in group.notes["tokens"][index]]
        lines = _lines(tokens, probabilities, completion.transcript, colours=colours)
        blocks.append("\n".join([head, *lines, *_turns(completion)]))
    return "\n\n".join(blocks)


def _turns(completion: Completion) -> list[str]:
    """A line per turn, such as ``turn 1: 12 tokens, calls, read 2 tokens, reward 0.5``; none without an environment."""
    lines = []
    for number, turn in enumerate(completion.turns, start=1):
        facts = [f"{turn.written} tokens", *(["calls"] if turn.called else [])]
        facts += [f"read {turn.observed} tokens"] if turn.observed else []
        facts += [f"reward {turn.reward:.3g}"] if turn.reward else []
        facts += [f"failed: {turn.failure}"] if turn.failure else []
        lines.append(f"  turn {number}: {', '.join(facts)}")
    return lines


def _lines(tokens: Sequence[str], probabilities: Sequence[float], text: str, *, colours: bool) -> list[str]:
    if colours:
        return ["".join(coloured(token, each) for token, each in zip(tokens, probabilities, strict=True))]
    pairs = [f"{token!r} {_shown(each)}" for token, each in zip(tokens, probabilities, strict=True)]
    return [text, "  " + "  ".join(pairs)]


def _shown(probability: float) -> str:
    return "read" if math.isnan(probability) else f"{probability:.2f}"


def coloured(token: str, probability: float) -> str:
    """A token on the background of its probability, none where the model read it; a line break ends the colour."""
    code = next((colour for limit, colour in COLOURS if probability <= limit), None)
    return token if code is None else "\n".join(f"\x1b[30;{code}m{part}\x1b[0m" for part in token.split("\n"))


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    head, _, rest = (__doc__ or "").partition("\n")
    made = argparse.ArgumentParser(
        prog="rltrain sample", description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("source", metavar="MODEL_OR_RUN", help="a run folder, a model's folder, or a name on the hub")
    made.add_argument("prompt")
    made.add_argument("--answer", metavar="GOLD", help="judge the completions by the run's rewards")
    made.add_argument("--tag", action="append", default=[], help="of the prompt, where the run reads a handbook by tag")
    made.add_argument("--n", type=int, default=4, help="completions (default 4)")
    made.add_argument("--temperature", type=float, help="default: the run's; 0 is greedy")
    made.add_argument("--max-new-tokens", type=int, help="default: the run's")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--plain", action="store_true", help="no colours")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the completions."""
    options = parser().parse_args(arguments)
    progress.begin()
    with progress.set_up():
        group = _sampled(options)
    print(shown(group, colours=sys.stdout.isatty() and not options.plain))


def _sampled(options: argparse.Namespace) -> Group:
    source = source_of(options.source)
    given = {"temperature": options.temperature, "max_new_tokens": options.max_new_tokens}
    sampling = replace(source.sampling, **{key: value for key, value in given.items() if value is not None})
    if options.answer is not None and not source.rewards:
        raise ConfigError(f"--answer: {options.source} is no run with rewards; give a run folder, or leave it out")
    source = replace(source, sampling=sampling)
    with torch.no_grad():
        return sample(source, options.prompt, n=options.n, seed=options.seed, answer=options.answer, tags=options.tag)


if __name__ == "__main__":
    with cli.errors_in_one_line():
        main()
