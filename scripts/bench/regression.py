"""Second moment and signal-to-noise of a real model's policy gradient under several estimators, against RLOO's.

    python scripts/bench/regression.py +experiment=forks cold_start.path=RUN/cold_start [-- --groups 200 --warm-up 10]

Words before ``--`` are those of rltrain.train. The policy does not move. Groups are drawn from the cold start, step by
step as in a run, and given to every estimator in turn, so that all see the same completions. An estimate is that of a
group, ``g = 1/G·sum_i sum_t A_it·grad log pi(a_it)``. Over n groups

    second moment = mean ‖g‖²          signal = mean of g_i·g_j over pairs of different groups, an estimate of ‖E g‖²
    signal-to-noise = signal / (second moment - signal)

The same after Adam: ``v_j`` is the mean square of coordinate j of an arm over all minibatches of these groups, which
are made as in training. The second moment is then that of ``g_j/(sqrt(v_j) + eps)`` with RLOO's v for every arm, the
signal-to-noise with the arm's v. The last column is what a small step of Adam gains, to first order: ``sum_j E[g_j of
RLOO]·E[g_j]/(sqrt(v_j) + eps)``, with the arm's v.

Two rows are bounds. They have the coefficients of (1, R, T) that make the second moment of the whole gradient smallest,
before or after Adam, fitted on one half of the groups and judged on the other.

Inner products between groups are those of count sketches, norms are exact. Intervals are 95 % bootstrap intervals over
groups, of the ratio to RLOO on the same groups.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rltrain import cli
from rltrain.advantages.estimator import Estimator, estimator_of
from rltrain.advantages.regression import RegressionConfig, rows_of_group
from rltrain.advantages.score_norms import lite_norms
from rltrain.batching.minibatches import split
from rltrain.build import Run, build
from rltrain.registry import load_callable
from rltrain.runtime import dist
from rltrain.trainer import draw
from rltrain.types import Context, Group

BASELINE = "RLOO"
ARMS: Mapping[str, tuple[str, dict[str, Any]]] = {
    BASELINE: ("group", {"baseline": "leave_one_out", "scale": "none"}),
    "GRPO": ("group", {}),
    "regression": ("regression", {}),
    "regression, running sums": ("regression", {"running_sum": True}),
    "regression, exact weights": ("regression", {"weight": "exact"}),
    "regression, (1, R)": ("regression", {"tree": False}),
    "regression, equal groups 0": ("regression", {"zero_equal_groups": True}),
    "regression / std": ("regression", {"scale": "std"}),
    "regression, prefix scale": ("regression", {"prefix_scale": True}),
    "leave-one-out tree": ("leave_one_out_tree", {}),
    "TEMPO without std": ("tempo", {"normalize_std": False}),
    "prefix scale": ("group", {"baseline": "leave_one_out", "scale": "none", "prefix_scale": True}),
}
TERMS = ("reward", "constant", "mean of others", "tree")  # a regression's advantage is the first minus c'(the others)
BOUNDS = {"best for the gradient": "plain", "best after Adam": "adam"}
METRICS = ("plain", "adam")  # as it is, and divided by the root of RLOO's v
OWN = "step"  # divided by the root of the arm's v
SKETCH = 1 << 12
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
    """What an estimator gave: per group the sketch and the squared norm, before and after RLOO's Adam, and its own."""

    norms: dict[str, list[float]] = field(default_factory=lambda: {metric: [] for metric in (*METRICS, OWN)})
    sketches: dict[str, list[Tensor]] = field(default_factory=lambda: {metric: [] for metric in (*METRICS, OWN)})


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A step's groups, and of each the advantages of every arm."""

    step: int
    groups: Sequence[Group]
    rows: Sequence[Mapping[str, list[Tensor]]]


@dataclass(kw_only=True)
class Judged:
    """The arms, and per group the inner products of the gradients of ``TERMS``, before and after Adam."""

    arms: dict[str, Arm]
    terms: dict[str, Arm]
    products: dict[str, list[Tensor]]


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


def spanning_gradients(logprobs_N: Tensor, weights_KN: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``mix_KR`` and ``basis_RD`` whose product is ``grad (sum_n weights[k, n]·logprobs[n])`` for each k.

    R is the rank of the weights, and there is one backward pass for each of R.
    """
    left_KR, values_R, right_RN = torch.linalg.svd(weights_KN.double(), full_matrices=False)
    rank = int((values_R > 1e-9 * values_R[0]).sum())
    basis_RD = torch.zeros(rank, sum(p.numel() for p in parameters))
    for row, row_N in enumerate(right_RN[:rank].to(logprobs_N.dtype)):
        gradients = torch.autograd.grad((row_N * logprobs_N).sum(), parameters, retain_graph=True)
        basis_RD[row] = torch.cat([gradient.flatten() for gradient in gradients])
    return (left_KR * values_R)[:, :rank].float(), basis_RD


def terms_of(group: Group) -> list[Tensor]:
    """The advantages whose gradients make up any regression's on (1, R, T): flat, in the order of ``TERMS``."""
    norms = [lite_norms(completion) for completion in group.completions]
    rows = rows_of_group(group, norms, RegressionConfig())
    pairs = [(row, len(norms_T)) for row, norms_T in zip(rows, norms, strict=True)]
    reward_N = torch.cat([torch.full((n,), 0.0 if row is None else row.reward).double() for row, n in pairs])
    features_NF = torch.cat([torch.zeros(n, 3).double() if row is None else row.features_TF for row, n in pairs])
    return [reward_N, *features_NF.T]


class Bench:
    """The run, the estimators with their states, and what was measured so far."""

    def __init__(self, run: Run, arms: Mapping[str, Estimator]) -> None:
        self._run, self._estimators = run, arms
        self._states: dict[str, dict[str, Tensor]] = {name: {} for name in arms}
        self._parameters = [p for p in run.policy.model.parameters() if p.requires_grad]
        self._size = sum(p.numel() for p in self._parameters)
        self._sketch = Sketch(self._size)
        self._squares = {name: torch.zeros(self._size) for name in arms}
        self._minibatches = 0
        self.judged = Judged(
            arms={name: Arm() for name in arms},
            terms={name: Arm() for name in TERMS},
            products={metric: [] for metric in METRICS},
        )

    def drawn(self, step: int) -> Drawn:
        """The groups of a step, and every arm's advantages."""
        groups = draw(self._run, self._run.scope(step), 0)
        values = {}
        for name, estimator in self._estimators.items():
            context = Context(
                step=step,
                seed=self._run.config.seed,
                entropy=self._run.entropies,
                state_of=lambda _, name=name: self._states[name],
            )
            values[name] = [list(rows) for rows in estimator(groups, context).values]
        return Drawn(
            step=step,
            groups=groups,
            rows=[{name: of_arm[index] for name, of_arm in values.items()} for index in range(len(groups))],
        )

    def gradients(self, group: Group, rows: Mapping[str, list[Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
        """From one forward pass: the mix [R] of every arm and of ``TERMS``, and the basis [R, D] of the gradients."""
        weights = {name: torch.cat(of_arm) for name, of_arm in rows.items()}
        weights |= dict(zip(TERMS, terms_of(group), strict=True))
        stacked_KN = torch.stack([weights_N.double() for weights_N in weights.values()]) / len(group.completions)
        mix_KR, basis_RD = spanning_gradients(completion_logprobs(self._run, group), stacked_KN, self._parameters)
        return dict(zip(weights, mix_KR, strict=True)), basis_RD

    def add_squares(self, drawn: Drawn) -> None:
        """Add the squares of the gradients of a step's minibatches."""
        config = self._run.config
        for part in split(len(drawn.groups), config.batch.minibatches, seed=config.seed, step=drawn.step):
            sums = {name: torch.zeros(self._size) for name in self._estimators}
            for index in part:
                mixes, basis_RD = self.gradients(drawn.groups[index], drawn.rows[index])
                for name, sum_D in sums.items():
                    sum_D += mixes[name] @ basis_RD
            for name, sum_D in sums.items():
                self._squares[name] += (sum_D / len(part)).square()
            self._minibatches += 1

    def scales(self) -> dict[str, Tensor]:
        """``1/(sqrt(v) + eps)`` of every arm, 0 where v is 0."""
        roots = {name: (square_D / self._minibatches).sqrt() for name, square_D in self._squares.items()}
        eps = self._run.config.optimizer.eps
        return {name: torch.where(root_D > 0, 1 / (root_D + eps), 0.0) for name, root_D in roots.items()}

    def judge(self, group: Group, rows: Mapping[str, list[Tensor]], scales: Mapping[str, Tensor]) -> None:
        """Record a group."""
        mixes, basis_RD = self.gradients(group, rows)
        terms_KR = torch.stack([mixes[name] for name in TERMS]).double()
        for metric, scale in (("plain", 1.0), ("adam", scales[BASELINE])):
            scaled_RD = basis_RD * scale
            products_RR = (scaled_RD @ scaled_RD.T).double()
            sketches_RS = torch.stack([self._sketch(row_D) for row_D in scaled_RD]) if len(scaled_RD) else None
            for name, mix_R in mixes.items():
                arm = self.judged.arms.get(name) or self.judged.terms[name]
                arm.norms[metric].append(float(mix_R.double() @ products_RR @ mix_R.double()))
                arm.sketches[metric].append(torch.zeros(SKETCH) if sketches_RS is None else mix_R @ sketches_RS)
            self.judged.products[metric].append(terms_KR @ products_RR @ terms_KR.T)
        for name, arm in self.judged.arms.items():
            step_D = (mixes[name] @ basis_RD) * scales[name]
            arm.norms[OWN].append(float(step_D.double().square().sum()))
            arm.sketches[OWN].append(self._sketch(step_D))


def measure(run: Run, arms: Mapping[str, Estimator], *, groups: int, warm_up: int) -> Judged:
    """``warm_up`` steps for the estimators' states, then whole steps until there are ``groups`` groups, twice over."""
    bench = Bench(run, arms)
    for step in range(warm_up):
        bench.drawn(step)
    count = math.ceil(groups / run.config.batch.prompts_per_step)
    kept = [bench.drawn(step) for step in range(warm_up, warm_up + count)]
    for index, drawn in enumerate(kept):
        bench.add_squares(drawn)
        show(f"Adam's v: {index + 1} of {count} steps")
    scales = bench.scales()
    for index, drawn in enumerate(kept):
        for group, rows in zip(drawn.groups, drawn.rows, strict=True):
            bench.judge(group, rows, scales)
        show(f"judged: {index + 1} of {count} steps")
    print(file=sys.stderr)
    return bench.judged


def show(said: str) -> None:
    """One line of progress, in place of the last one."""
    print(f"\r{said:<40}", end="", file=sys.stderr, flush=True)


def pair_means(left_ND: np.ndarray, right_ND: np.ndarray, counts_RN: np.ndarray) -> np.ndarray:
    """Mean of ``left_i·right_j`` over pairs of different groups; ``counts_RN[r, n]``: how often resample r holds n.

    Pairs of a group with itself, also of two copies, are no pairs of different groups.
    """
    gram_NN = left_ND @ right_ND.T
    np.fill_diagonal(gram_NN, 0.0)
    pairs_R = counts_RN.sum(1) ** 2 - (counts_RN**2).sum(1)
    return np.einsum("rn,nm,rm->r", counts_RN, gram_NN, counts_RN, optimize=True) / pairs_R


def moments(arm: Arm, metric: str, counts_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Second moment and signal of each resample."""
    sketches_ND = stacked(arm.sketches[metric])
    second_R = counts_RN @ np.array(arm.norms[metric]) / counts_RN.sum(1)
    return second_R, pair_means(sketches_ND, sketches_ND, counts_RN)


def stacked(sketches: Sequence[Tensor]) -> np.ndarray:
    """[groups, SKETCH], float64."""
    return torch.stack(list(sketches)).double().numpy()


def best_coefficients(products_NKK: Tensor) -> Tensor:
    """c that makes the mean of ``‖g_0 - sum_k c_k g_k‖²`` smallest, from inner products of the g."""
    mean_KK = products_NKK.mean(0)
    return torch.linalg.lstsq(mean_KK[1:, 1:], mean_KK[1:, :1], driver="gelsd").solution[:, 0]


def best_of_halves(judged: Judged, metric: str) -> tuple[Tensor, Tensor]:
    """The best coefficients in a metric on the groups of even index, and on the others."""
    products_NKK = torch.stack(judged.products[metric])
    return best_coefficients(products_NKK[::2]), best_coefficients(products_NKK[1::2])


def bound(judged: Judged, fitted_on: str) -> Arm:
    """The arm with the best coefficients in the metric ``fitted_on``, each half judged with those of the other."""
    of_even_F, of_odd_F = best_of_halves(judged, fitted_on)
    arm = Arm()
    for index in range(len(judged.products[fitted_on])):
        signed_K = torch.cat([torch.ones(1).double(), -(of_odd_F if index % 2 == 0 else of_even_F)])
        for metric in METRICS:
            parts_KS = torch.stack([judged.terms[name].sketches[metric][index] for name in TERMS])
            arm.norms[metric].append(float(signed_K @ judged.products[metric][index] @ signed_K))
            arm.sketches[metric].append(signed_K.float() @ parts_KS)
    return arm


Ratio = tuple[float, float, float]
COLUMNS = ("second moment", "signal-to-noise", "second moment after Adam", "signal-to-noise after Adam", "Adam's step")


def ratios(judged: Judged, *, seed: int = 0) -> dict[str, dict[str, Ratio]]:
    """Per arm, by the names of ``COLUMNS``, the ratio to RLOO's: estimate, low, high. Bounds have no v."""
    count = len(judged.products["plain"])
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    counts_RN = np.concatenate([np.ones((1, count)), draws])  # the first is the sample itself
    arms = judged.arms | {f"regression, {name}": bound(judged, metric) for name, metric in BOUNDS.items()}
    found: dict[str, dict[str, np.ndarray]] = {}
    true_ND = stacked(judged.arms[BASELINE].sketches["plain"])
    for name, arm in arms.items():
        second_R, signal_R = moments(arm, "plain", counts_RN)
        found[name] = {"second moment": second_R, "signal-to-noise": signal_R / (second_R - signal_R)}
        found[name]["second moment after Adam"] = moments(arm, "adam", counts_RN)[0]
        if arm.norms[OWN]:
            second_R, signal_R = moments(arm, OWN, counts_RN)
            found[name]["signal-to-noise after Adam"] = signal_R / (second_R - signal_R)
            found[name]["Adam's step"] = pair_means(true_ND, stacked(arm.sketches[OWN]), counts_RN)
    base = found[BASELINE]
    return {name: {what: _interval(row[what] / base[what]) for what in row} for name, row in found.items()}


def _interval(values_R: np.ndarray) -> Ratio:
    low, high = np.quantile(values_R[1:], [0.025, 0.975])
    return float(values_R[0]), float(low), float(high)


def table(found: Mapping[str, Mapping[str, Ratio]]) -> str:
    """The ratios as Markdown."""
    lines = [f"| estimator | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for name, row in found.items():
        cells = ["{:.2f} ({:.2f} to {:.2f})".format(*row[what]) if what in row else "–" for what in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def coefficients(judged: Judged) -> list[str]:
    """A line for each bound: the coefficients of (1, R, T) on either half."""
    said = []
    for name, metric in BOUNDS.items():
        halves = ["(" + ", ".join(f"{c:.2f}" for c in c_F.tolist()) + ")" for c_F in best_of_halves(judged, metric)]
        said.append(f"{name}, coefficients of (1, R, T) on either half: {' and '.join(halves)}")
    return said


def noise_of_a_step(judged: Judged, groups: int) -> str:
    """RLOO's signal-to-noise of a rollout of so many groups, before and after Adam."""
    ones_RN = np.ones((1, len(judged.products["plain"])))
    said = []
    for metric in ("plain", OWN):
        second_R, signal_R = moments(judged.arms[BASELINE], metric, ones_RN)
        said.append(f"{groups * float(signal_R[0] / (second_R[0] - signal_R[0])):.2f}")
    return f"RLOO's signal-to-noise of a step of {groups} groups: {said[0]}, after Adam {said[1]}"


def chosen_arms(names: str, also: Sequence[str]) -> dict[str, Estimator]:
    """RLOO and those named, or all; then functions by their import paths."""
    wanted = [name.strip() for name in names.split(";") if name.strip()] or list(ARMS)
    arms = {name: estimator_of(*ARMS[name]) for name in dict.fromkeys([BASELINE, *wanted])}
    return arms | {path.split(":")[-1]: estimator_of(load_callable(path, key="--also"), {}) for path in also}


def main() -> None:
    """Build the run, measure, print."""
    words, own = sys.argv[1:], []
    if "--" in words:
        cut = words.index("--")
        words, own = words[:cut], words[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=200, help="groups that are judged")
    parser.add_argument("--warm-up", type=int, default=10, help="steps before, for the estimators' states")
    parser.add_argument("--arms", default="", help=f"names between semicolons, of: {'; '.join(ARMS)}")
    parser.add_argument("--also", nargs="*", default=[], help="functions (groups, options, context), module:function")
    if not words or "--help" in words:
        parser.print_help()
        return
    options = parser.parse_args(own)
    torch.set_num_threads(1)
    with cli.errors_in_one_line():
        config = cli.compose([*words, "evaluation.every_steps=0", "run_dir=runs/bench/regression"])
        arms = chosen_arms(options.arms, options.also)
        dist.setup(deadline_s=config.deadline("collective"), join_s=config.deadline("join"))
        try:
            run = build(config)
            judged = measure(run, arms, groups=options.groups, warm_up=options.warm_up)
            print(table(ratios(judged)))
            norms = judged.arms[BASELINE].norms["plain"]
            rate = 100 * np.mean([norm > 0 for norm in norms])
            print(f"\n{len(norms)} groups of {config.batch.group_size}, {rate:.0f} % with unequal rewards")
            print("\n".join([noise_of_a_step(judged, config.batch.prompts_per_step), *coefficients(judged)]))
        finally:
            dist.teardown()


if __name__ == "__main__":
    main()
