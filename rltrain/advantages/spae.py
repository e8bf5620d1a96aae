"""SPAE: credit per reasoning step, from how far each step moves the policy's answer (arXiv 2601.03823)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltrain.advantages.failed_steps import failed_step_fraction
from rltrain.advantages.group import as_rewards
from rltrain.advantages.spae_steps import Steps, check_delimiter, split_steps
from rltrain.advantages.whitening import whiten_where
from rltrain.advantages.written import written_masks
from rltrain.batching.zero_variance import is_zero_variance
from rltrain.config import AdvantageConfig
from rltrain.errors import require
from rltrain.registry import register
from rltrain.rollout.probe_types import ProbeRequest, ProbeResult, ProbeSettings, vocabulary
from rltrain.runtime import dist
from rltrain.types import Advantages, Context, Group, Mean, Need, Notes, is_right

Floats = Sequence[float] | Tensor
Nested = Sequence[Sequence[Floats]]
WHITENING_EPS = 1e-8


@dataclass(kw_only=True)
class SpaeConfig(AdvantageConfig):
    """See :func:`spae_advantages`, :func:`~rltrain.advantages.spae_steps.split_steps` and the probes' settings.

    ``saturate_positive_only`` shrinks after saturation only where r_i is above its group's mean. A reward above
    ``correct_above`` is a right answer in the diagnostics. Potentials of the first ``logged_steps`` steps are logged.
    """

    xi: float = 0.5  # weight of the step potential; 0 turns step shaping off
    alpha: float = 0.5  # how much credit shrinks after saturation; 0 turns it off
    eps_sat: float = 0.9  # a step with a potential above it saturates what follows
    whiten: bool = True  # whiten step credit over the batch
    saturate_positive_only: bool = False
    delimiter: str = ".\n\n"  # a token that ends in it ends a step
    think_close: str = "</think>"  # steps lie before it
    max_steps: int = 64  # most steps of a completion
    probe: str = "**Final Answer**\n\\boxed{"  # text put behind each step to ask for the answer
    continuations: int = 5  # answers drawn behind each step
    probe_max_tokens: int = 10  # longest of these answers
    probe_temperature: float = 0.6  # they are drawn at
    probe_tokens_per_pass: int = 16384  # most tokens of a forward pass of the probes
    correct_above: float = 0.5
    logged_steps: int = 8

    def __post_init__(self) -> None:
        require(self.xi >= 0, f"advantage.xi={self.xi}: must be >= 0; 0 turns step shaping off")
        require(0 <= self.alpha <= 1, f"advantage.alpha={self.alpha}: must lie in [0, 1]; 0 turns saturation off")
        require(
            bool(self.delimiter), "advantage.delimiter is empty: every token would end a step; set for example '\\n'"
        )
        require(self.max_steps >= 1, f"advantage.max_steps={self.max_steps}: set at least 1")
        require(self.continuations >= 1, f"advantage.continuations={self.continuations}: set at least 1")
        require(self.probe_max_tokens >= 1, f"advantage.probe_max_tokens={self.probe_max_tokens}: set at least 1")
        require(
            self.probe.count("{") - self.probe.count("}") == 1,
            f"advantage.probe={self.probe!r}: must open exactly one brace, which ends the answer; end it in \\boxed{{",
        )


def step_potential(accuracy: Floats, confidence: Floats) -> Tensor:
    """``Phi = 1.5·Acc·Conf + 0.5·Acc - Conf``, float64, in [-1, 1] for arguments in [0, 1].

    1: sure and right; -1: sure and wrong; 0: no idea.
    """
    accuracy_K, confidence_K = _float64(accuracy), _float64(confidence)
    return 1.5 * accuracy_K * confidence_K + 0.5 * accuracy_K - confidence_K


def _float64(values: Floats | int) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def _gains(potentials: Sequence[Tensor]) -> list[Tensor]:
    """``g = exp(minmax(dPhi)) - mean(exp(minmax(dPhi)))`` over all steps and ranks, 0 if all jumps are equal."""
    jumps = [torch.cat([torch.zeros_like(phi_K[:1]), phi_K.diff()]) for phi_K in potentials]
    flat = torch.cat([*jumps, torch.empty(0, dtype=torch.float64)])
    nothing = torch.tensor([-torch.inf], dtype=torch.float64)
    extremes = torch.stack([torch.cat([-flat, nothing]).max(), torch.cat([flat, nothing]).max()])
    minus_low, high = dist.all_max(extremes, name="SPAE: extremes of the potential jumps")
    spread = high + minus_low
    scaled = ((flat + minus_low) / spread).exp() if spread > 0 else torch.zeros_like(flat)
    sums = dist.all_sum(torch.stack([scaled.sum(), _float64(len(flat))]), name="SPAE: mean step gain")
    return list((scaled - sums[0] / sums[1].clamp(min=1)).split([len(jump_K) for jump_K in jumps]))


def _saturation(potential_K: Tensor, *, alpha: float, eps_sat: float) -> Tensor:
    """``f_k = 1 - alpha·(1 - e^{-C_k})``, C_k the number of strictly earlier steps with Phi > eps_sat."""
    saturated_K = (potential_K > eps_sat).double()
    return 1 - alpha * (1 - (saturated_K - saturated_K.cumsum(0)).exp())


def spae_advantages(
    rewards: Sequence[Sequence[float | None] | Tensor],
    step_tokens: Sequence[Sequence[Sequence[int]]],
    accuracy: Nested,
    confidence: Nested,
    tail_tokens: Sequence[Sequence[int]],
    *,
    xi: float,
    alpha: float,
    eps_sat: float,
    whiten: bool = True,
    saturate_positive_only: bool = False,
    written: Sequence[Sequence[Tensor]] | None = None,
) -> list[list[Tensor]]:
    r"""One float64 tensor [T] per completion. All arguments are nested groups x completions (x steps).

        A = (r_i - mean(r))·f_k + xi·g_k      on the tokens of step k;  f = 1, g = 0 on the tail
        f_k = 1 - alpha·(1 - e^{-C_k})        C_k: strictly earlier steps with Phi > eps_sat
        g_k = exp(minmax(dPhi_k)) - mean(exp(minmax(dPhi)))     dPhi_1 = 0;  max = min gives g = 0
        result = (A - mean_B(A)) / (std_B(A) + 1e-8)            population std (ddof 0)

    minmax and the mean in g run over all steps, mean_B and std_B over all tokens, of the groups on all ranks. Each rank
    must call this once per batch, with no groups if it has none. Zero-variance groups are for
    the caller to leave out: given here, they take part and get g. ``saturate_positive_only`` (our switch) sets f = 1
    where r_i <= mean(r).

    NaN or None rewards abstain: they leave every statistic and get 0. So do tokens that the masks [T] ``written`` do
    not mark, where they are given. Lengths that disagree are an error.
    """
    sizes = [len(group) for group in tail_tokens]
    bases = [base for group in rewards for base in _centred(group)]
    steps = [[int(count) for count in row] for group in step_tokens for row in group]
    tails = [int(tail) for group in tail_tokens for tail in group]
    potentials = [
        step_potential(*row) for group in zip(accuracy, confidence, strict=True) for row in zip(*group, strict=True)
    ]
    _check_lengths(bases, steps, potentials, tails)
    counted = [i for i, base in enumerate(bases) if not base.isnan()]
    credits = []
    for i, gain_K in zip(counted, _gains([potentials[i] for i in counted]), strict=True):
        shrink_K = _saturation(potentials[i], alpha=alpha, eps_sat=eps_sat)
        if saturate_positive_only and bases[i] <= 0:
            shrink_K = torch.ones_like(shrink_K)
        credit_K1 = torch.cat([bases[i] * shrink_K + xi * gain_K, bases[i][None]])
        credits.append(credit_K1.repeat_interleave(torch.tensor([*steps[i], tails[i]])))
    rows = [torch.zeros(sum(row) + tail).double() for row, tail in zip(steps, tails, strict=True)]
    for i, row_T in zip(counted, credits, strict=True):
        rows[i] = row_T
    marked = _marked(rows, counted, written)
    if whiten:
        (rows,) = whiten_where([rows], [marked], eps=WHITENING_EPS, name="SPAE's advantages")
    remaining = iter(row_T.masked_fill(~mask_T, 0.0) for row_T, mask_T in zip(rows, marked, strict=True))
    return [[next(remaining) for _ in range(size)] for size in sizes]


def _marked(rows: Sequence[Tensor], counted: Sequence[int], written: Sequence[Sequence[Tensor]] | None) -> list[Tensor]:
    """The tokens that have credit: those that are written, of the completions that count."""
    everywhere = [torch.ones(len(row_T), dtype=torch.bool) for row_T in rows]
    masks = [mask_T for of_group in written for mask_T in of_group] if written else everywhere
    return [mask_T & (i in set(counted)) for i, mask_T in enumerate(masks)]


def _centred(rewards: Sequence[float | None] | Tensor) -> Tensor:
    rewards_G = as_rewards(rewards)
    return rewards_G - rewards_G.nanmean()


def _check_lengths(
    bases: Sequence[Tensor], steps: Sequence[Sequence[int]], potentials: Sequence[Tensor], tails: Sequence[int]
) -> None:
    if not len(bases) == len(steps) == len(potentials) == len(tails):
        raise ValueError(
            f"{len(bases)} rewards, {len(steps)} step_tokens, {len(potentials)} accuracies, {len(tails)} tail_tokens: "
            "give each completion one of each"
        )
    for i, (row, phi_K) in enumerate(zip(steps, potentials, strict=True)):
        if len(row) != len(phi_K):
            raise ValueError(f"completion {i}: {len(row)} step_tokens but {len(phi_K)} accuracies; give one per step")


def _split_group(group: Group, config: SpaeConfig, texts: Sequence[str]) -> list[Steps]:
    """Steps per completion. A completion that abstains is all tail."""
    return [
        split_steps(
            [texts[token] if token < len(texts) else "" for token in completion.token_ids],
            delimiter=config.delimiter,
            close=config.think_close,
            max_steps=0 if reward.isnan() else config.max_steps,
            turns=completion.turns,
        )
        for completion, reward in zip(group.completions, as_rewards(group.rewards_G), strict=True)
    ]


def _requests(group: Group, splits: Sequence[Steps], answer_ids: Sequence[int]) -> list[ProbeRequest]:
    return [
        ProbeRequest(
            problem_id=group.prompt.problem.id,
            sample_index=index,
            prompt_ids=group.prompt.token_ids,
            completion_ids=completion_ids,
            cuts=steps.cuts,
            answer_ids=tuple(answer_ids),
            occurrence=group.prompt.occurrence,
        )
        for index, (completion_ids, steps) in enumerate(zip(group.completion_ids, splits, strict=True))
    ]


def _token_ids(text: str, context: Context) -> tuple[int, ...]:
    assert context.tokenizer is not None
    return tuple(context.tokenizer(text, add_special_tokens=False)["input_ids"])


def _probe(
    groups: Sequence[Group], splits: Sequence[Sequence[Steps]], config: SpaeConfig, context: Context
) -> list[list[ProbeResult]]:
    settings = ProbeSettings(
        seed=context.seed,
        step=context.step,
        suffix_ids=_token_ids(config.probe, context),
        continuations=config.continuations,
        max_tokens=config.probe_max_tokens,
        temperature=config.probe_temperature,
        tokens_per_pass=config.probe_tokens_per_pass,
    )
    requests = [
        request
        for group, steps in zip(groups, splits, strict=True)
        for request in _requests(group, steps, _token_ids(group.prompt.problem.answer, context))
    ]
    results = iter(context.rollout.probe(requests, settings))
    return [[next(results) for _ in group.completions] for group in groups]


def _diagnostics(
    rewards: Sequence[Tensor],
    splits: Sequence[Steps],
    potentials: Sequence[Tensor],
    written: Sequence[Tensor],
    config: SpaeConfig,
) -> dict[str, Mean]:
    """Over the completions given. Right-to-Wrong: wrong although some step was saturated.

    Tokens are written ones. Solving tokens reach up to the first saturated step, in right completions that have one.
    Checking tokens are the rest of their think blocks.
    """
    first_saturated = [_first(phi_K > config.eps_sat) for phi_K in potentials]
    right = [bool(is_right(reward, above=config.correct_above)) for reward in rewards]
    lost = [float(first is not None and not is_right) for first, is_right in zip(first_saturated, right, strict=True)]
    solving_and_checking = [
        (int(mask_T[: steps.cuts[first]].sum()), steps.think_tokens_behind(steps.cuts[first]))
        for first, is_right, steps, mask_T in zip(first_saturated, right, splits, written, strict=True)
        if first is not None and is_right
    ]
    by_step = {
        f"spae/potential/step_{k + 1}": Mean.of([float(phi_K[k]) for phi_K in potentials if len(phi_K) > k])
        for k in range(config.logged_steps)
    }
    return by_step | {
        "spae/potential/mean": Mean.of([float(phi) for phi_K in potentials for phi in phi_K]),
        "spae/failed_step_fraction": Mean.of([failed_step_fraction(phi_K.tolist()) for phi_K in potentials]),
        "spae/steps": Mean.of([len(phi_K) for phi_K in potentials]),
        "spae/solving_tokens": Mean.of([solving for solving, _ in solving_and_checking]),
        "spae/checking_tokens": Mean.of([checking for _, checking in solving_and_checking]),
        "spae/right_to_wrong": Mean.of(lost),
        "spae/right_to_wrong_of_saturated": Mean.of(
            [is_lost for is_lost, first in zip(lost, first_saturated, strict=True) if first is not None]
        ),
    }


def _first(flags_K: Tensor) -> int | None:
    return int(flags_K.nonzero()[0]) if bool(flags_K.any()) else None


def _notes(splits: Sequence[Steps], probes: Sequence[ProbeResult]) -> Notes:
    """Notes on a group for its samples: the tokens of each step, and the results of the probe at its end."""
    return {
        "step_tokens": [steps.step_tokens for steps in splits],
        "step_accuracy": [probe.accuracy_K.tolist() for probe in probes],
        "step_confidence": [probe.confidence_K.tolist() for probe in probes],
        "step_potential": [step_potential(probe.accuracy_K, probe.confidence_K).tolist() for probe in probes],
    }


def _of_kept(groups: Sequence[Group], config: SpaeConfig, context: Context) -> Advantages:
    texts = vocabulary(context.tokenizer)
    rewards = [as_rewards(group.rewards_G) for group in groups]
    splits = [_split_group(group, config, texts) for group in groups]
    started_s = time.perf_counter()
    probes = _probe(groups, splits, config, context)
    seconds = Mean.of(time.perf_counter() - started_s)
    accuracy = [[probe.accuracy_K for probe in group] for group in probes]
    confidence = [[probe.confidence_K for probe in group] for group in probes]
    written = written_masks(groups)
    values = spae_advantages(
        rewards,
        [[steps.step_tokens for steps in group] for group in splits],
        accuracy,
        confidence,
        [[steps.tail_tokens for steps in group] for group in splits],
        xi=config.xi,
        alpha=config.alpha,
        eps_sat=config.eps_sat,
        whiten=config.whiten,
        saturate_positive_only=config.saturate_positive_only,
        written=written,
    )
    counted = [
        (reward, steps, step_potential(probe.accuracy_K, probe.confidence_K), mask_T)
        for rewards_G, split, group, masks in zip(rewards, splits, probes, written, strict=True)
        for reward, steps, probe, mask_T in zip(rewards_G, split, group, masks, strict=True)
        if not reward.isnan()
    ]
    metrics = _diagnostics(
        [row[0] for row in counted],
        [row[1] for row in counted],
        [row[2] for row in counted],
        [row[3] for row in counted],
        config,
    )
    notes = [_notes(*pair) for pair in zip(splits, probes, strict=True)]
    return Advantages(values=values, metrics=metrics | {"timing_s/probe": seconds}, notes=notes)


@register("advantage", "spae", SpaeConfig, needs={Need.PROBES})
def spae(groups: Sequence[Group], config: SpaeConfig, context: Context) -> Advantages:
    """:func:`spae_advantages` of the groups with unequal rewards. The policy is probed at the end of every step.

    Zero-variance groups are dropped first: they are not probed, are in no statistic of the global batch (minmax, means,
    whitening), and get exactly 0.
    """
    check_delimiter(context.tokenizer, config.delimiter)
    kept = [group for group in groups if not is_zero_variance(as_rewards(group.rewards_G))]
    estimated = _of_kept(kept, config, context)
    of_group = {
        id(group): (values, notes) for group, values, notes in zip(kept, estimated.values, estimated.notes, strict=True)
    }
    zeros = [[torch.zeros(len(ids)).double() for ids in group.completion_ids] for group in groups]
    pairs = [of_group.get(id(group), (zero, {})) for group, zero in zip(groups, zeros, strict=True)]
    return Advantages(
        values=[values for values, _ in pairs], metrics=estimated.metrics, notes=[notes for _, notes in pairs]
    )
