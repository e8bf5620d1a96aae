"""Seconds of a whole GRPO step: rltrain beside TRL's GRPOTrainer, each in a process of its own.

Same model, prompts, group size, completion limit, sampling, fp32 and thread count; a coin for a reward, so that
nearly every group trains; a learning rate that leaves the model where it is. Completions end where the model ends them:
random weights give the tiny model's a geometric spread of lengths, SmolLM2 answers in its chat. Runs are paired: every
round starts each side once, one after the other, and takes the median of its steps after a warm-up step; ratios are
medians over rounds.

    trl             its defaults, but fp32
    trl-fast        and without gradient checkpointing
    trl-continuous  and with transformers' continuous batching

    python scripts/bench/step.py                                        # tiny, 16 x 8 completions of at most 32 and 192
    python scripts/bench/step.py --model smollm2 --prompts 4 --limits 32
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import LEARNING_RATE, STEPS_ALONE

SIDES = ("rltrain", "trl", "trl-fast", "trl-continuous")
MODELS = {
    "tiny": ["model=tiny", "data=small_integers", "sampling.max_prompt_tokens=32"],
    "smollm2": ["+experiment=smollm2_randomcalc", "model.examples=[]", "model.system=null"],
}


def overrides(arguments: argparse.Namespace, limit: int, folder: str) -> list[str]:
    """The run that both sides do."""
    return [
        *MODELS[arguments.model],
        *STEPS_ALONE,
        f"batch.prompts_per_step={arguments.prompts}",
        f"batch.group_size={arguments.group_size}",
        f"sampling.max_new_tokens={limit}",
        f"steps={arguments.steps + 1}",
        f"run_dir={folder}",
    ]


def rltrain_steps(config: Any) -> list[dict[str, float]]:
    """One record a step from the run's own metrics."""
    from rltrain.runs.metrics import read_jsonl
    from rltrain.trainer import fit

    fit(config)
    rows = [row for row in read_jsonl(Path(config.run_dir) / "metrics.jsonl") if "timing_s/step" in row]
    return [
        {
            "step": row["timing_s/step"],
            "rollout": row["timing_s/rollout"],
            "length": row["completions/mean_length"],
        }
        for row in rows
    ]


def coin(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that says nothing, and differs inside nearly every group."""
    return [float(hash((index, str(text))) % 2) for index, text in enumerate(completions)]


def trl_steps(side: str, config: Any) -> list[dict[str, float]]:
    """One record a step, timed around TRL's own methods."""
    import datasets
    import torch
    import transformers
    import trl

    from rltrain.data.random_calculation import RandomCalculation
    from rltrain.policy.load import load_policy

    policy = load_policy(config.model)
    problems = RandomCalculation(config.data, "train")[: 4 * config.batch.prompts_per_step * config.steps]
    chat = config.model.chat
    prompts = [[{"role": "user", "content": each.prompt}] if chat else each.prompt for each in problems]
    rows = config.batch.prompts_per_step * config.batch.group_size
    spent: dict[str, float] = {"rollout": 0.0}
    lengths: list[float] = []

    class Timed(trl.GRPOTrainer):
        def _generate(self, *args: Any) -> Any:
            start = time.perf_counter()
            result = super()._generate(*args)
            spent["rollout"] += time.perf_counter() - start
            return result

        def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
            lengths.append(sum(map(len, completion_ids_list)) / len(completion_ids_list))
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.start, self.records = 0.0, []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start, spent["rollout"] = time.perf_counter(), 0.0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds = time.perf_counter() - self.start
            self.records.append({"step": seconds, "rollout": spent["rollout"], "length": lengths[-1]})

    clock = Clock()
    trainer = Timed(
        model=policy.model,
        processing_class=policy.tokenizer,
        reward_funcs=coin,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        callbacks=[clock],
        args=trl.GRPOConfig(
            output_dir=config.run_dir,
            max_steps=config.steps,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=1,
            num_generations=config.batch.group_size,
            max_completion_length=config.sampling.max_new_tokens,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            learning_rate=LEARNING_RATE,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            **({} if side == "trl" else {"gradient_checkpointing": False}),
            **({"use_transformers_continuous_batching": True} if side == "trl-continuous" else {}),
        ),
    )
    trainer.train()
    return clock.records


def child(side: str, words: list[str]) -> None:
    """Run one side and print its records and peak memory."""
    import torch

    from rltrain import cli

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config = cli.compose(words)
    records = rltrain_steps(config) if side == "rltrain" else trl_steps(side, config)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("RESULT " + json.dumps({"records": records, "peak_gib": peak_gib}))


def run(side: str, words: list[str], threads: int) -> dict[str, float] | str:
    """The medians of one child's steps after the first, or the last line it died with."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "WANDB_MODE": "disabled",
        "TOKENIZERS_PARALLELISM": "0",
    }
    command = [sys.executable, __file__, "--child", side, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        return (done.stderr.strip().splitlines() or ["no output"])[-1]
    result = json.loads(found[-1].removeprefix("RESULT "))
    steps = result["records"][1:]
    medians = {key: statistics.median(step[key] for step in steps) for key in ("step", "rollout", "length")}
    return medians | {"peak_gib": result["peak_gib"]}


def row(side: str, rounds: list[tuple[Any, Any]], completions: int) -> str:
    """A line of the table from pairs (rltrain's medians, this side's medians)."""
    good = [(ours, theirs) for ours, theirs in rounds if not isinstance(ours, str) and not isinstance(theirs, str)]
    if not good:
        return f"| {side} | failed: {rounds[0][1]} |" + " |" * 6
    step, rollout, length, peak_gib = (
        statistics.median(theirs[key] for _, theirs in good) for key in ("step", "rollout", "length", "peak_gib")
    )
    ratio = statistics.median(theirs["step"] / ours["step"] for ours, theirs in good)
    return (
        f"| {side} | {step:.2f} | {rollout:.2f} | {step - rollout:.2f} | {ratio:.2f} | {length:.1f} "
        f"| {completions * length / step:.0f} | {peak_gib:.2f} |"
    )


def table(rounds: list[dict[str, Any]], completions: int) -> str:
    """One line a side: medians over rounds, and how many times rltrain's step it takes."""
    lines = [
        "| side | step, s | rollout, s | rest, s | times rltrain's step | mean length | tokens/s | peak, GiB |",
        "|---|---|---|---|---|---|---|---|",
        *(row(side, [(one["rltrain"], one[side]) for one in rounds], completions) for side in rounds[0]),
    ]
    return "\n".join(lines)


def main() -> None:
    """Print one table per completion limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--limits", type=int, nargs="+", default=[32, 192], help="most tokens of a completion")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each child")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    arguments = parser.parse_args()
    sides = list(dict.fromkeys(["rltrain", *arguments.sides]))
    for limit in arguments.limits:
        rounds = []
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as folder:
                rounds.append(
                    {
                        side: run(side, overrides(arguments, limit, f"{folder}/{side}"), arguments.threads)
                        for side in sides
                    }
                )
        rows = arguments.prompts * arguments.group_size
        print(f"\n{arguments.model}, {arguments.prompts} x {arguments.group_size} of at most {limit} tokens\n")
        print(table(rounds, rows), flush=True)


if __name__ == "__main__":
    child(sys.argv[2], sys.argv[3:]) if sys.argv[1:2] == ["--child"] else main()
