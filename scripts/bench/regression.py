"""Second moment and signal-to-noise of a real model's policy gradient under several estimators, against RLOO's.

    python scripts/bench/regression.py +experiment=forks cold_start.path=RUN/cold_start [-- --groups 200 --warm-up 10]

Words before ``--`` are those of rltrain.train. The policy does not move. Groups are drawn from the cold start, step by
step as in a run, and given to every estimator in turn, so that all see the same completions. An estimate is that of a
group, ``g = 1/G·sum_i sum_t A_it·grad log pi(a_it)``. Over n groups

    second moment = mean ‖g‖²          signal = mean of g_i·g_j over pairs of different groups, an estimate of ‖E g‖²
    signal-to-noise = signal / (second moment - signal)

Inner products are those of count sketches, norms are exact. Intervals are 95 % bootstrap intervals over groups, of the
ratio to RLOO on the same groups.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rltrain import cli
from rltrain.advantages.estimator import Estimator, estimator_of
from rltrain.build import Run, build
from rltrain.runtime import dist
from rltrain.trainer import draw
from rltrain.types import Context, Group

BASELINE = "RLOO"
ARMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    BASELINE: ("group", {"baseline": "leave_one_out", "scale": "none"}),
    "regression": ("regression", {}),
    "regression, running sums": ("regression", {"running_sum": True}),
    "regression, (1, R)": ("regression", {"tree": False}),
    "leave-one-out tree": ("leave_one_out_tree", {}),
    "TEMPO without std": ("tempo", {"normalize_std": False}),
    "prefix scale": ("group", {"baseline": "leave_one_out", "scale": "none", "prefix_scale": True}),
}
SKETCH = 1 << 14
RESAMPLES = 2000


class Sketch:
    """A count sketch of flat gradients: each coordinate, with a random sign, is added to one of ``SKETCH`` buckets."""

    def __init__(self, size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._buckets = torch.randint(SKETCH, (size,), generator=generator)
        self._signs = torch.randint(2, (size,), generator=generator).mul_(2).sub_(1).float()

    def __call__(self, flat_D: Tensor) -> Tensor:
        return torch.zeros(SKETCH).index_add_(0, self._buckets, flat_D * self._signs)


@dataclass(kw_only=True)
class Arm:
    """An estimator with its state, and what it gave: per group the sketch and the squared norm."""

    estimator: Estimator
    state: dict[str, Tensor]
    sketches: list[Tensor]
    norms: list[float]

    def advantages(self, groups: Sequence[Group], context: Context) -> list[list[Tensor]]:
        return [list(rows) for rows in self.estimator(groups, context).values]


def completion_logprobs(run: Run, group: Group) -> Tensor:
    """log pi of every completion token of a group, flat, completion after completion."""
    prompt = list(group.prompt.token_ids)
    rows = [prompt + list(ids) for ids in group.completion_ids]
    width = max(map(len, rows))
    ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logits_BTV = run.policy.model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, len(prompt) - 1 : -1]
    logprobs_BT = logits_BTV.log_softmax(-1).gather(-1, ids_BT[:, len(prompt) :, None]).squeeze(-1)
    return torch.cat([row_T[: len(ids)] for row_T, ids in zip(logprobs_BT, group.completion_ids, strict=True)])


def record(run: Run, group: Group, advantages: Mapping[str, list[Tensor]], arms: Mapping[str, Arm], sketch: Sketch):
    """The gradient of a group under every arm, from one forward pass."""
    parameters = [p for p in run.policy.model.parameters() if p.requires_grad]
    logprobs_N = completion_logprobs(run, group)
    for name, rows in advantages.items():
        weights_N = torch.cat(rows).to(logprobs_N.dtype)
        objective = (weights_N * logprobs_N).sum() / len(group.completions)
        gradients = torch.autograd.grad(objective, parameters, retain_graph=True)
        flat_D = torch.cat([gradient.flatten() for gradient in gradients])
        arms[name].norms.append(float(flat_D.double().square().sum()))
        arms[name].sketches.append(sketch(flat_D))


def measure(run: Run, *, groups: int, warm_up: int) -> dict[str, Arm]:
    """Draw ``warm_up`` steps for the estimators' states alone, then steps until ``groups`` groups are judged."""
    arms = {
        name: Arm(estimator=estimator_of(part, options), state={}, sketches=[], norms=[])
        for name, (part, options) in ARMS.items()
    }
    sketch = Sketch(sum(p.numel() for p in run.policy.model.parameters() if p.requires_grad))
    step = 0
    while len(arms[BASELINE].norms) < groups:
        drawn = draw(run, run.scope(step), 0)
        values = {
            name: arm.advantages(drawn, Context(step=step, seed=run.config.seed, state_of=lambda _, arm=arm: arm.state))
            for name, arm in arms.items()
        }
        for index, group in enumerate(drawn if step >= warm_up else ()):
            record(run, group, {name: rows[index] for name, rows in values.items()}, arms, sketch)
        step += 1
        print(f"\r{len(arms[BASELINE].norms)} of {groups} groups", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return arms


def moments(arm: Arm, counts_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Second moment and signal of each resample; ``counts_RN[r, n]`` is how often resample r holds group n.

    Pairs of a group with itself, also of two copies, are no pairs of different groups.
    """
    norms_N = np.array(arm.norms)
    sketches = torch.stack(arm.sketches).double().numpy()
    gram_NN = sketches @ sketches.T
    np.fill_diagonal(gram_NN, 0.0)
    total_R = counts_RN.sum(1)
    pairs_R = total_R**2 - (counts_RN**2).sum(1)
    signal_R = np.einsum("rn,nm,rm->r", counts_RN, gram_NN, counts_RN, optimize=True) / pairs_R
    return counts_RN @ norms_N / total_R, signal_R


def ratios(arms: Mapping[str, Arm], *, seed: int = 0) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Per arm the second moment and the signal-to-noise over RLOO's: estimate, low, high."""
    count = len(arms[BASELINE].norms)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    counts_RN = np.concatenate([np.ones((1, count)), draws])  # the first is the sample itself
    found = {name: moments(arm, counts_RN) for name, arm in arms.items()}
    noise = {name: signal / (second - signal) for name, (second, signal) in found.items()}
    return {
        name: {
            "second moment": _interval(found[name][0] / found[BASELINE][0]),
            "signal-to-noise": _interval(noise[name] / noise[BASELINE]),
        }
        for name in arms
    }


def _interval(values_R: np.ndarray) -> tuple[float, float, float]:
    low, high = np.quantile(values_R[1:], [0.025, 0.975])
    return float(values_R[0]), float(low), float(high)


def table(found: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> str:
    """The ratios as Markdown."""
    lines = ["| estimator | second moment / RLOO's | signal-to-noise / RLOO's |", "|---|---|---|"]
    for name, of_arm in found.items():
        cells = [f"{estimate:.2f} ({low:.2f} to {high:.2f})" for estimate, low, high in of_arm.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Build the run, measure, print."""
    words, own = sys.argv[1:], []
    if "--" in words:
        cut = words.index("--")
        words, own = words[:cut], words[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=200, help="groups that are judged")
    parser.add_argument("--warm-up", type=int, default=10, help="steps before, for the estimators' states")
    if not words or "--help" in words:
        parser.print_help()
        return
    options = parser.parse_args(own)
    torch.set_num_threads(1)
    with cli.errors_in_one_line():
        config = cli.compose([*words, "evaluation.every_steps=0", "run_dir=runs/bench/regression"])
        dist.setup(deadline_s=config.deadline("collective"), join_s=config.deadline("join"))
        try:
            run = build(config)
            arms = measure(run, groups=options.groups, warm_up=options.warm_up)
            print(table(ratios(arms)))
            rate = np.mean([norm > 0 for norm in arms[BASELINE].norms])
            print(f"\n{options.groups} groups of {config.batch.group_size}, {100 * rate:.0f} % with unequal rewards")
        finally:
            dist.teardown()


if __name__ == "__main__":
    main()
