"""What continuations cost: forwarded prefix tokens with forked caches and without, and their share of a step.

python scripts/bench/continuations.py [--completions 8 --steps 20 --draws 9]         tokens, on the tiny model
python scripts/bench/continuations.py --run [OVERRIDE …]                             a run's logged cost
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rltrain import cli, trainer
from rltrain.config import SamplingConfig
from rltrain.policy.load import load_policy
from rltrain.rollout.continuation_types import ContinuationRequest
from rltrain.rollout.local import LocalRollout, LocalRolloutConfig


def forwarded(model: Any, work: Callable[[], Any]) -> tuple[int, float]:
    """Tokens of all forwards of more than one token a row, and seconds, while ``work`` runs."""
    counted: list[int] = []

    def count(module: Any, args: Any) -> None:
        if args[0].ndim == 2 and args[0].shape[1] > 1:
            counted.append(args[0].numel())

    handle = model.get_input_embeddings().register_forward_pre_hook(count)
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    handle.remove()
    return sum(counted), seconds


def requests(ids: Sequence[int], *, completions: int, steps: int, draws: int, tokens: int) -> list[ContinuationRequest]:
    """The states behind each step but the last of completions of ``tokens`` tokens."""
    width = tokens // steps
    return [
        ContinuationRequest(
            problem_id="bench",
            sample_index=sample,
            prompt_ids=tuple(ids[:16]),
            completion_ids=tuple(ids[(sample + t) % len(ids)] for t in range(cut)),
            draws=draws,
            max_new_tokens=width,
        )
        for sample in range(completions)
        for cut in range(width, tokens, width)
    ]


def compare(arguments: argparse.Namespace) -> None:
    """Print forwarded prefix tokens and seconds: forked, and every state asked by itself."""
    config = cli.compose(["+experiment=quickstart"])
    policy = load_policy(config.model)
    tokens = arguments.tokens
    sampling = SamplingConfig(max_new_tokens=2 * tokens, max_prompt_tokens=32)
    engine = LocalRollout(LocalRolloutConfig(), sampling, policy, seed=0)
    ids = policy.tokenizer("0123456789+-*/()=" * 4, add_special_tokens=False)["input_ids"]
    for draws in (1, arguments.draws):
        asked = requests(ids, completions=arguments.completions, steps=arguments.steps, draws=draws, tokens=tokens)
        forked, forked_s = forwarded(policy.model, lambda asked=asked: engine.continue_(asked, step=0))
        anew, anew_s = forwarded(policy.model, lambda asked=asked: [engine.continue_([one], step=0) for one in asked])
        print(
            f"K = {draws}: {len(asked)} states, forked {forked} prefix tokens, each anew {anew} "
            f"({anew / forked:.1f} times as many), time ratio {anew_s / forked_s:.1f}"
        )


def measure_run(overrides: Sequence[str]) -> None:
    """Train, and print what continuations cost by the run's own metrics, without its first step."""
    with tempfile.TemporaryDirectory() as folder:
        trainer.fit(cli.compose([*overrides, f"run_dir={folder}/run", "tracking.wandb=disabled"]))
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "continuations/tokens" in line][1:]
    for name in ("continuations/requests", "continuations/tokens", "continuations/share", "completions/mean_length"):
        print(f"{name:28s} {sum(line[name] for line in steps) / len(steps):.4g}")


def main() -> None:
    """Either of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--draws", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--run", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if arguments.run is not None:
        measure_run(arguments.run)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
