"""TRL's GRPOTrainer with TEMPO for its own advantage, on generated arithmetic: one import and one argument differ.

Random weights learn nothing in a few steps: give the folder of a model with a cold start.

    python scripts/trl_tempo.py --model FOLDER [--advantage tempo] [--steps 100]
"""

from __future__ import annotations

import argparse

import datasets
import trl

from rltrain.compat.trl import GRPOTrainer
from rltrain.data.random_calculation import generate
from rltrain.policy.load import load_policy
from rltrain.policy.tiny import TinyConfig
from rltrain.rewards.random_calculation import boxed_number, parse_literal


def exact(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """1 where the boxed number is the answer."""
    return [float(boxed_number(text) == parse_literal(gold)) for text, gold in zip(completions, answer, strict=True)]


def main() -> None:
    """Train and print TRL's log lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a saved tiny model; random weights without it")
    parser.add_argument("--advantage", default="tempo", help="the name of any registered estimator")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", default="runs/trl_tempo")
    arguments = parser.parse_args()

    policy = load_policy(TinyConfig(path=arguments.model))
    problems = [
        problem for steps in (2, 3) for problem in generate(steps, 2000, seed=0, split="train", preset="integers")
    ]
    rows = {
        "prompt": [problem.meta["expression"] + "\n" for problem in problems],
        "answer": [problem.answer for problem in problems],
    }
    trainer = GRPOTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        reward_funcs=exact,
        train_dataset=datasets.Dataset.from_dict(rows),
        advantage=arguments.advantage,
        args=trl.GRPOConfig(
            output_dir=arguments.output,
            max_steps=arguments.steps,
            per_device_train_batch_size=128,
            num_generations=8,
            max_completion_length=48,
            temperature=1.0,
            learning_rate=5e-5,
            lr_scheduler_type="constant",
            loss_type="dapo",
            epsilon=0.2,
            epsilon_high=0.28,
            delta=3.0,
            beta=0.0,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()


if __name__ == "__main__":
    main()
