"""Seconds of a step with the next batch sampled meanwhile (rollout.ahead=true) beside the usual order.

Each side is a process of its own, its threads of torch given; the sides of a round run one after the other, and ratios
are medians over rounds of the medians of a run's steps after the first. A coin for a reward, and a learning rate
that leaves the model where it is, so that all sides sample the same completions.

    python scripts/bench/ahead.py                       # the tiny model with random weights, 16 x 8 completions
    python scripts/bench/ahead.py --model smollm2 --prompts 4 --steps 3 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import STEPS_ALONE

MODELS = {
    "tiny": ["model=tiny", "data=small_integers", "sampling.max_prompt_tokens=32"],
    "smollm2": ["+experiment=smollm2_randomcalc", "model.examples=[]", "model.system=null"],
}
# Threads of torch; a run that samples ahead has a second thread that computes, with as many of its own.
SIDES = {
    "usual, 1 thread": (["rollout.ahead=false"], 1),
    "usual, 2 threads": (["rollout.ahead=false"], 2),
    "ahead, 2 x 1 thread": (["rollout.ahead=true"], 1),
}
STAGES = ("step", "rollout", "collate", "train", "rollout_ahead", "rollout_wait")


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The run that all sides do."""
    return [
        *MODELS[arguments.model],
        *STEPS_ALONE,
        f"batch.prompts_per_step={arguments.prompts}",
        f"batch.group_size={arguments.group_size}",
        f"sampling.max_new_tokens={arguments.limit}",
        f"steps={arguments.steps + 1}",
    ]


def run(words: list[str], threads: int) -> dict[str, float]:
    """The medians of the stages of one run's steps after the first."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rltrain.train", *words, f"run_dir={folder}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"] > 1]
    return {stage: statistics.median(line.get(f"timing_s/{stage}", 0.0) for line in steps) for stage in STAGES}


def main() -> None:
    """Print one row a side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--limit", type=int, default=48, help="most tokens of a completion")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each run")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    words = overrides(arguments)
    rounds = [
        {name: run([*words, *more], threads) for name, (more, threads) in SIDES.items()}
        for _ in range(arguments.rounds)
    ]
    first = next(iter(SIDES))
    print(f"| side | {', s | '.join(STAGES)}, s | times the first side's step |\n|{'---|' * (len(STAGES) + 2)}")
    for name in SIDES:
        medians = [statistics.median(one[name][stage] for one in rounds) for stage in STAGES]
        ratio = statistics.median(one[name]["step"] / one[first]["step"] for one in rounds)
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in medians)} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
