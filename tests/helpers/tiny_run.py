"""A run that takes a second or two: a very small random policy, short completions, a keyed random reward."""

import json
from pathlib import Path

from rltrain import cli
from rltrain.config import RunConfig

OVERRIDES = [
    "model.hidden_size=32",
    "model.layers=2",
    "model.heads=2",
    "model.intermediate_size=64",
    "data=small_integers",
    "reward@rewards.answer=random",
    "sampling.max_new_tokens=10",
    "sampling.max_prompt_tokens=32",
    "batch.prompts_per_step=4",
    "batch.group_size=4",
    "batch.token_budget=256",
    "optimizer.learning_rate=1e-3",
    "evaluation.every_steps=2",
    "evaluation.problems=6",
    "checkpoint.every_steps=2",
    "tracking.wandb=disabled",
    "tracking.samples_every_steps=2",
    "steps=4",
]
# What depends on the clock, the machine, or how rows are laid out, not on what is computed.
MEASURED = ("timing_s/", "perf/", "padding_share", "continuations/share", "environment/latency")
MEASURED += ("eval_environment/latency",)


def config(run_dir: Path, *overrides: str) -> RunConfig:
    return cli.compose([*OVERRIDES, f"run_dir={run_dir}", *overrides])


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what was measured on the clock."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in lines]
