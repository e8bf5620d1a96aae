"""Every registered estimator against the true policy gradient, on problems small enough to enumerate.

The policy is a table: one softmax per prefix, so that all completions, the gradient g of the expected reward and the
value of every prefix are exact. An estimator sees sampled groups as in training; its estimate is
(1/G)·sum_i sum_t A_it·grad log pi(token_it | prefix_it), the loss's length weights left aside.

With m = E[estimate]: cosine = cos(m, g); scale = <m, g>/|g|²; bias = |m - g|/|g|; variance = trace of the covariance
times the completions in the estimate; SNR = (<m, g>/|g|)²/variance: what one completion is worth, whatever the scale.
|m|² comes from pairs of different batches (a U-statistic), so that sampling noise does not pass for bias; intervals are
95 % bootstrap over batches, and all estimators see the same samples.

    python scripts/bench/estimators.py
    python scripts/bench/estimators.py --custom my_package.my_module:estimator --only grpo
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rltrain.registry import Part, discover, parts
from rltrain.rollout.probe_types import ProbeRequest, ProbeResult, ProbeSettings
from rltrain.types import Completion, Context, Group, Need, Problem, Prompt

EOS = 0
VOCABULARY = 4
PROVIDED = {Need.PROBES}

# What the algorithm presets make of a part; a registered part that is not named here appears with its defaults.
PRESETS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "group": [
        ("grpo", {}),
        ("dr_grpo", {"scale": "none"}),
        ("rloo", {"baseline": "leave_one_out", "scale": "none"}),
    ],
    "tempo": [("tempo", {}), ("tempo, no std", {"normalize_std": False})],
    "spae": [("spae", {}), ("spae, xi=0", {"xi": 0.0})],
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A reward on completions of ``length`` tokens; with ``eos_from``, token 0 ends one from that many tokens on."""

    name: str
    says: str
    length: int
    correct: Callable[[tuple[int, ...]], bool]
    eos_from: int | None = None


TASKS = [
    Task(name="decisive token", says="token 3 of 5 is right", length=5, correct=lambda ids: ids[2] == 1),
    Task(
        name="two needed tokens",
        says="tokens 1 and 4 of 5 are right",
        length=5,
        correct=lambda ids: ids[0] == 1 and ids[3] == 2,
    ),
    Task(
        name="redundant tail",
        says="token 2 is right; up to 4 more follow that change nothing",
        length=6,
        correct=lambda ids: ids[1] == 1,
        eos_from=2,
    ),
    Task(
        name="sparse success",
        says="tokens 1, 2 and 3 of 5 are right",
        length=5,
        correct=lambda ids: ids[:3] == (1, 2, 3),
    ),
]


@dataclass(frozen=True, kw_only=True)
class World:
    """A task under one random policy, enumerated. C completions, S prefixes that go on, D = S·V parameters."""

    task: Task
    policy_SV: np.ndarray
    state_of: dict[tuple[int, ...], int]
    completions: list[tuple[int, ...]]
    probability_C: np.ndarray
    reward_C: np.ndarray

    @cached_property
    def values(self) -> dict[tuple[int, ...], float]:
        """The exact value of every prefix and completion: its expected reward under the policy."""
        values = dict(zip(self.completions, self.reward_C.tolist(), strict=True))
        for state in sorted(self.state_of, key=len, reverse=True):
            row = self.policy_SV[self.state_of[state]]
            values[state] = sum(row[token] * values[(*state, token)] for token in np.flatnonzero(row).tolist())
        return values

    @cached_property
    def _tokens(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per completion, the state before each token and the flat parameter of the token."""
        rows = [
            (np.array([self.state_of[ids[:t]] for t in range(len(ids))]), np.array(ids)) for ids in self.completions
        ]
        return [(states, states * VOCABULARY + ids) for states, ids in rows]

    def gradient(self, drawn: Sequence[int], weights: np.ndarray) -> np.ndarray:
        """``sum_n weights_n·grad log pi(token_n)`` over the tokens of the drawn completions, shape [D]."""
        states = np.concatenate([self._tokens[i][0] for i in drawn])
        entries = np.concatenate([self._tokens[i][1] for i in drawn])
        taken_SV = np.bincount(entries, weights, self.policy_SV.size).reshape(self.policy_SV.shape)
        return (taken_SV - np.bincount(states, weights, len(self.policy_SV))[:, None] * self.policy_SV).ravel()

    @cached_property
    def true_gradient(self) -> np.ndarray:
        """The gradient of the expected reward, by enumeration."""
        lengths = [len(ids) for ids in self.completions]
        return self.gradient(range(len(lengths)), np.repeat(self.probability_C * self.reward_C, lengths))


def enumerate_world(task: Task, seed: int) -> World:
    """Every prefix gets its own random logits, normal with standard deviation 0.5."""
    generator = np.random.default_rng(seed)
    rows, state_of, completions, probabilities = [], {}, [], []
    frontier: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while frontier:
        prefix, probability = frontier.pop()
        ended = bool(prefix) and task.eos_from is not None and prefix[-1] == EOS
        if ended or len(prefix) == task.length:
            completions.append(prefix)
            probabilities.append(probability)
            continue
        row = np.exp(0.5 * generator.standard_normal(VOCABULARY))
        if task.eos_from is not None and len(prefix) < task.eos_from:
            row[EOS] = 0.0
        state_of[prefix] = len(rows)
        rows.append(row / row.sum())
        frontier += [((*prefix, token), probability * rows[-1][token]) for token in np.flatnonzero(row).tolist()]
    rewards = np.array([float(task.correct(ids)) for ids in completions])
    return World(
        task=task,
        policy_SV=np.array(rows),
        state_of=state_of,
        completions=completions,
        probability_C=np.array(probabilities),
        reward_C=rewards,
    )


@dataclass(frozen=True)
class StepTokenizer:
    """Every token but EOS ends a step, so that an estimator that probes steps may probe after each token."""

    has_eos: bool

    def __len__(self) -> int:
        return VOCABULARY

    def batch_decode(self, ids: Sequence[Sequence[int]], **options: Any) -> list[str]:
        """The text of each row of ids."""
        return ["".join("" if self.has_eos and token == EOS else f"{token}.\n\n" for token in row) for row in ids]

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """Any text is one token: probes are answered from the table, not from text."""
        return {"input_ids": [1]}


@dataclass(frozen=True)
class ExactProber:
    """Probes without noise: accuracy is the exact value V of the prefix, confidence exp(-entropy of right or wrong)."""

    world: World
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], ProbeResult] = field(default_factory=dict)

    def probe(self, requests: Sequence[ProbeRequest], settings: ProbeSettings) -> list[ProbeResult]:
        """One result per request, in order."""
        return [self._result(request.completion_ids, request.cuts) for request in requests]

    def _result(self, ids: tuple[int, ...], cuts: tuple[int, ...]) -> ProbeResult:
        if (ids, cuts) not in self.known:
            accuracy_K = torch.tensor([self.world.values[ids[:cut]] for cut in cuts], dtype=torch.float64).clamp(0, 1)
            entropy_K = -torch.xlogy(accuracy_K, accuracy_K) - torch.xlogy(1 - accuracy_K, 1 - accuracy_K)
            self.known[ids, cuts] = ProbeResult(accuracy_K=accuracy_K, confidence_K=(-entropy_K).exp())
        return self.known[ids, cuts]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A row of the table: a part and the fields of its config that differ from the defaults."""

    label: str
    part: Part
    fields: dict[str, Any]

    def estimates(self, world: World, draws: np.ndarray, batch: int) -> np.ndarray:
        """One gradient estimate per batch of ``batch`` completions, shape [K, D]; ``draws`` is [groups, G]."""
        missing = self.part.needs - PROVIDED
        if missing:
            raise LookupError(f"needs {', '.join(sorted(need.name for need in missing))}, which a table does not have")
        config = self.part.config(**self.fields)
        tokenizer = StepTokenizer(has_eos=world.task.eos_from is not None)
        context = Context(tokenizer=tokenizer, rollout=ExactProber(world), max_new_tokens=world.task.length)
        completions = [
            Completion(token_ids=ids, logprobs=(0.0,) * len(ids), finish="stop") for ids in world.completions
        ]
        prompt = Prompt(problem=Problem(id="p", prompt="", answer="1"), token_ids=(1,))
        rewards_C = torch.from_numpy(world.reward_C)
        rows = []
        for drawn in draws.reshape(-1, batch // draws.shape[1], draws.shape[1]):
            groups = [
                Group(prompt=prompt, completions=tuple(completions[i] for i in row), rewards_G=rewards_C[row])
                for row in drawn
            ]
            values = self.part.function(groups, config, context).values
            weights = torch.cat([row_T for group in values for row_T in group]).double().numpy() / batch
            rows.append(world.gradient(drawn.ravel(), weights))
        return np.array(rows)


def contenders(outside: Mapping[str, Sequence[str]], only: Sequence[str]) -> Iterator[Contender]:
    """Every registered estimator, as its presets if it has any; ``outside``: import paths by how they are called."""
    custom = {path for paths in outside.values() for path in paths}
    presets = PRESETS | {
        part: [(path, {"import_path": path}) for path in paths] for part, paths in outside.items() if paths
    }
    for part in parts("advantage"):
        for label, fields in presets.get(part.name, [(part.name, {})]):
            if not only or label in only or part.name in only or label in custom:
                yield Contender(label=label, part=part, fields=fields)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g}, {self.high:.3g})"


def measure(
    estimates_KD: np.ndarray, truth_D: np.ndarray, batch: int, resamples: int, seed: int
) -> dict[str, Estimate]:
    """The columns of the table; weights_RK[0] is the sample itself, the others are bootstrap resamples of batches."""
    count = len(estimates_KD)
    generator = np.random.default_rng(seed)
    weights_RK = np.vstack([np.ones(count), generator.multinomial(count, np.full(count, 1 / count), resamples)]) / count
    square_K = (estimates_KD**2).sum(1)
    mean_RD = weights_RK @ estimates_KD
    # Pairs of one batch with itself are left out, in the resamples too: they hold noise, not signal.
    same_R = (weights_RK**2).sum(1)
    norm2_R = ((mean_RD**2).sum(1) - weights_RK**2 @ square_K) / (1 - same_R)
    truth2 = float(truth_D @ truth_D)
    along_R = mean_RD @ truth_D
    variance_R = batch * (weights_RK @ square_K - norm2_R)
    columns_R = {
        "cosine": np.clip(along_R / np.sqrt(np.maximum(norm2_R, 1e-300) * truth2), -1, 1),
        "scale": along_R / truth2,
        "bias": np.sqrt(np.maximum(norm2_R - 2 * along_R + truth2, 0) / truth2),
        "variance": variance_R,
        "SNR": along_R**2 / truth2 / np.maximum(variance_R, 1e-300),
    }
    return {
        name: Estimate(value=values[0], low=np.quantile(values[1:], 0.025), high=np.quantile(values[1:], 0.975))
        for name, values in columns_R.items()
    }


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One estimator on one task at one group size: its columns, or why there are none."""

    task: str
    group_size: int
    label: str
    columns: dict[str, Estimate] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0


def run(world: World, row: Contender, group_size: int, arguments: argparse.Namespace) -> Cell:
    """Measure one cell. What an estimator raises is that row's result, for the others are no worse for it."""
    task = world.task
    generator = np.random.default_rng([arguments.seed, group_size])
    draws = generator.choice(
        len(world.completions), (arguments.completions // group_size, group_size), p=world.probability_C
    )
    start = time.perf_counter()
    try:
        estimates_KD = row.estimates(world, draws, arguments.batch)
    except Exception as error:
        return Cell(task=task.name, group_size=group_size, label=row.label, reason=str(error))
    columns = measure(estimates_KD, world.true_gradient, arguments.batch, arguments.resamples, arguments.seed)
    seconds = time.perf_counter() - start
    return Cell(task=task.name, group_size=group_size, label=row.label, columns=columns, seconds=seconds)


def table(cells: Sequence[Cell], worlds: Sequence[World]) -> str:
    """Markdown: one table per task; SNR in thousandths."""
    lines = []
    for world in worlds:
        expected = float(world.probability_C @ world.reward_C)
        lines += [
            f"\n**{world.task.name}**: {world.task.says}; expected reward {expected:.3f}, "
            f"{len(world.completions)} completions, {world.policy_SV.size} parameters\n",
            "| estimator | G | cosine | scale | bias | variance | SNR per completion, 1e-3 |",
            "|---|---|---|---|---|---|---|",
        ]
        for cell in (cell for cell in cells if cell.columns and cell.task == world.task.name):
            values = cell.columns
            snr = Estimate(**{key: 1e3 * number for key, number in vars(values["SNR"]).items()})
            shown = [
                values["cosine"],
                f"{values['scale'].value:.3g}",
                values["bias"],
                f"{values['variance'].value:.3g}",
                snr,
            ]
            lines.append(f"| {cell.label} | {cell.group_size} | " + " | ".join(map(str, shown)) + " |")
    reasons = sorted({f"{cell.label}: {cell.reason}" for cell in cells if not cell.columns})
    return "\n".join([*lines, *(f"\nNot measured: {reason}" for reason in reasons)])


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Cosine and SNR against the group size, one column per task, bars for the intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = [cell for cell in cells if cell.columns]
    names = list(dict.fromkeys(cell.task for cell in measured))
    labels = list(dict.fromkeys(cell.label for cell in measured))
    group_sizes = sorted({cell.group_size for cell in measured})
    figure, axes = plt.subplots(2, len(names), figsize=(4 * len(names), 6.5), squeeze=False, sharex=True)
    for (row, column), (j, name) in itertools.product(enumerate(("cosine", "SNR")), enumerate(names)):
        axis = axes[row][j]
        for k, label in enumerate(labels):
            line = [cell for cell in measured if (cell.task, cell.label) == (name, label)]
            estimates = [cell.columns[column] for cell in line]
            middle = np.array([one.value for one in estimates])
            spread = np.abs([[one.low for one in estimates], [one.high for one in estimates]] - middle)
            # Shifted a little, or the bars of estimators that agree would hide each other.
            sizes = np.array([cell.group_size for cell in line]) * 1.03 ** (k - len(labels) / 2)
            axis.errorbar(sizes, middle, spread, label=label, color=f"C{k}", marker="o", markersize=3, capsize=2)
        axis.set_xscale("log", base=2)
        axis.set_xticks(group_sizes, map(str, group_sizes))
        axis.set_yscale("linear" if column == "cosine" else "log")
        axis.set_title(name if row == 0 else "")
        axis.set_xlabel("group size" if row else "")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("cosine with the true gradient")
    axes[1][0].set_ylabel("signal-to-noise per completion")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line; refuses sizes that do not divide."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8, 16], help="group sizes")
    parser.add_argument("--completions", type=int, default=8192, help="samples per cell")
    parser.add_argument("--batch", type=int, default=256, help="completions per call of an estimator")
    parser.add_argument("--resamples", type=int, default=400, help="bootstrap resamples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--custom", nargs="+", default=[], metavar="MODULE:FUNCTION", help="estimators from outside")
    parser.add_argument("--verl", nargs="+", default=[], metavar="MODULE:FUNCTION", help="the same, written for verl")
    parser.add_argument("--import", nargs="+", default=[], dest="modules", help="modules that register estimators")
    parser.add_argument("--only", nargs="+", default=[], help="names of estimators or presets")
    parser.add_argument("--table", type=Path, help="also write the table to this file")
    parser.add_argument("--plot", type=Path, default=Path("runs/bench/estimators.png"))
    arguments = parser.parse_args(words)
    if arguments.completions % arguments.batch or any(arguments.batch % size for size in arguments.groups):
        parser.error("--batch must divide --completions, and every group size must divide --batch")
    if arguments.completions // arguments.batch < 2:
        parser.error("the intervals need at least two batches: raise --completions or lower --batch")
    return arguments


def main(words: Sequence[str] | None = None) -> list[Cell]:
    """Print the table, write the plot."""
    arguments = parse(words)
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path.cwd()))
    discover()
    for module in arguments.modules:
        importlib.import_module(module)
    rows = list(contenders({"custom": arguments.custom, "verl_function": arguments.verl}, arguments.only))
    worlds = [enumerate_world(task, arguments.seed) for task in TASKS]
    cells = [
        run(world, row, group_size, arguments)
        for world, row, group_size in itertools.product(worlds, rows, arguments.groups)
    ]
    text = table(cells, worlds)
    print(text)
    for row in rows:
        print(f"{row.label}: {sum(cell.seconds for cell in cells if cell.label == row.label):.1f} s", file=sys.stderr)
    if arguments.table:
        arguments.table.write_text(text.strip() + "\n", encoding="utf-8")
    plot(cells, arguments.plot)
    return cells


if __name__ == "__main__":
    main()
